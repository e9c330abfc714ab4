"""Keys of `training` that decide how large an update is."""

from __future__ import annotations

import pytest
import torch

from sam3lora.errors import UserError
from sam3lora.model.components import component_of
from sam3lora.training.launch import train

from ...training.run_folder import lines_of
from .conftest import acts, take_step


def matrices(worker, kind: str) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in worker.model.named_parameters() if f".lora_{kind}." in name}


def largest_move(worker, component: str | None = None) -> float:
    """Largest entry of the B matrices, which start at 0."""
    moved = [b for name, b in matrices(worker, "B").items() if component in (None, component_of(name))]
    return max(b.abs().max().item() for b in moved)


def moment(worker, name: str) -> float:
    """Norm of one of AdamW's running means over all parameters."""
    squares = [state[name].double().square().sum() for state in worker.optimizer.state.values()]
    return torch.stack(squares).sum().sqrt().item()


def rates(result) -> list[float]:
    return [line["lr"] for line in lines_of(result, "step")]


@acts("training.learning_rate")
def test_learning_rate_is_the_size_of_the_first_step(build):
    # AdamW's first update of each entry is the learning rate itself.
    for rate in (1e-3, 1e-2):
        worker = build(f"training.learning_rate={rate}")
        take_step(worker)
        assert largest_move(worker) == pytest.approx(rate, rel=1e-2)


@acts("training.component_learning_rates")
def test_component_learning_rates_hold_for_their_component(build):
    worker = build("lora.apply_to_mask_decoder=true", "training.component_learning_rates.mask_decoder=0.01")
    take_step(worker)
    assert largest_move(worker, "detr_decoder") == pytest.approx(1e-3, rel=1e-2)
    assert largest_move(worker, "mask_decoder") == pytest.approx(1e-2, rel=1e-2)


@acts("training.weight_decay")
@pytest.mark.parametrize(("decay", "factor"), [(0.0, 1.0), (0.5, 0.95)])
def test_weight_decay_shrinks_what_has_no_gradient(decay, factor, build):
    # As long as B is 0, A has no gradient: only decay moves it, by learning rate x decay.
    worker = build("training.learning_rate=0.1", f"training.weight_decay={decay}")
    before = {name: a.clone() for name, a in matrices(worker, "A").items()}
    take_step(worker)
    for name, a in matrices(worker, "A").items():
        torch.testing.assert_close(a, before[name] * factor, rtol=1e-5, atol=1e-8)


@acts("training.adam_beta1", "training.adam_beta2")
@pytest.mark.parametrize(
    ("key", "mean", "short", "long", "factor"),
    [("adam_beta1", "exp_avg", 0.5, 0.9, 5), ("adam_beta2", "exp_avg_sq", 0.9, 0.99, 10)],
)
def test_betas_are_the_memory_of_the_running_means(key, mean, short, long, factor, build):
    # After one step the mean is (1 - beta) x gradient, or its square.
    first, second = (build(f"training.{key}={beta}") for beta in (short, long))
    take_step(first)
    take_step(second)
    assert moment(first, mean) == pytest.approx(factor * moment(second, mean), rel=1e-3)


@acts("training.adam_epsilon")
def test_epsilon_damps_small_gradients(build):
    worker = build("training.adam_epsilon=1")
    take_step(worker)
    # Gradients are clipped to norm 1, so with 1 added to the denominator no entry moves by the whole learning rate.
    assert 0 < largest_move(worker) < 0.5e-3


@acts("training.max_grad_norm")
@pytest.mark.parametrize("limit", [1e-4, 1e-3])
def test_max_grad_norm_bounds_the_gradient(limit, build):
    worker = build(f"training.max_grad_norm={limit}")
    _, norm = take_step(worker)
    assert norm > limit  # otherwise there is nothing to clip
    assert moment(worker, "exp_avg") / (1 - 0.9) == pytest.approx(limit, rel=1e-2)


@acts("training.warmup_steps")
def test_warmup_steps_rise_to_the_peak(plain_run, changed_run):
    assert rates(plain_run) == pytest.approx([1e-3] * 2)
    # Steps 1, 2 and 4 are logged.
    assert rates(changed_run) == pytest.approx([5e-4, 1e-3, 1e-3])


@acts("training.warmup_ratio")
def test_warmup_ratio_is_a_share_of_the_run(build):
    def steps(*overrides):
        return build("training.num_epochs=20", *overrides).state.warmup_steps

    # 40 steps
    assert steps("training.warmup_steps=null", "training.warmup_ratio=0.2") == 8
    assert steps("training.warmup_steps=3") == 3
    assert steps("training.warmup_steps=100") == 20
    with pytest.raises(UserError, match="warmup_ratio has no effect"):
        steps("training.warmup_steps=3", "training.warmup_ratio=0.2")


def test_a_longer_run_is_resumed_with_the_warmup_it_began_with(run, settings):
    # Warmed up over 2 of 4 steps; with 16 epochs more the rate does not begin to rise again.
    ratio = ("training.warmup_steps=null", "training.warmup_ratio=0.5")
    short = run("training.num_epochs=2", *ratio)
    assert rates(short) == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    folder = f"output.output_dir={short.output_dir}"
    longer = train(settings("training.num_epochs=4", *ratio, folder), resume=True)
    assert rates(longer) == pytest.approx([5e-4, *[1e-3] * 7])


@acts("training.lr_scheduler")
def test_lr_scheduler_is_the_course_of_the_rate(run):
    course = {name: rates(run("training.num_epochs=2", f"training.lr_scheduler={name}")) for name in
              ("constant", "cosine", "inverse_sqrt")}  # fmt: skip
    assert course["constant"] == pytest.approx([1e-3] * 4)
    assert course["cosine"][-1] == pytest.approx(1e-5)
    assert course["inverse_sqrt"] == pytest.approx([1e-3 * (1 + t) ** -0.5 for t in range(4)], rel=1e-5)
