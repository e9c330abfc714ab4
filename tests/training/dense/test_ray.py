"""Dense runs on two real Ray Train workers: what one worker learns, also after a worker was lost."""

from __future__ import annotations

import pytest

from sam3lora.training.launch import train

from ..ray_runs import ENVIRONMENT, SMALL_STEPS, local_ray, once_at_step, worker_processes
from ..run_folder import folder_of, lines_of
from .dense_runs import assert_same_weights, logged, weights_of

pytestmark = pytest.mark.slow

TWO_WORKERS = ("scaling.num_workers=2", *SMALL_STEPS)
# Dropout draws other numbers for other batches.
COMMON = ("lora.dropout=0", "data.horizontal_flip=0.5", "data.vertical_flip=0.5")


@pytest.fixture(scope="module", autouse=True)
def ray():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with local_ray(num_cpus=5):
            yield


@pytest.mark.parametrize("adapter", ["lora", "bottleneck"])
def test_two_workers_learn_what_one_does_with_twice_the_batch(make, adapter):
    # A large epsilon: Adam would blow up the last bits of gradients that are almost 0.
    common = [*(COMMON if adapter == "lora" else COMMON[1:]), "training.adam_epsilon=0.1", "training.num_epochs=1"]
    two = make(adapter, *common, *TWO_WORKERS, output="two")
    one = make(adapter, *common, "training.batch_size=2", output="one")
    for config in (two, one):
        train(config)
    assert [line["num_workers"] for line in lines_of(two, "start")] == [2]
    for kind, names in (("step", ("loss", "grad_norm")), ("epoch", ("valid_loss", "mean_iou"))):
        ours, theirs = logged(two, kind), logged(one, kind)
        assert len(ours) == len(theirs) > 0
        for name in names:
            assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-4), name
    weights, expected = weights_of(two), weights_of(one)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max() + 1e-9, name


def test_run_goes_on_after_a_worker_is_killed(make):
    def config(name: str):
        return make("lora", *TWO_WORKERS, "scaling.max_failures=1", "training.save_steps=2", output=name)

    straight, disturbed = config("straight"), config("disturbed")
    train(straight)
    with once_at_step(folder_of(disturbed), 3, lambda: worker_processes()[0].kill()) as killed:
        train(disturbed)
    assert killed.is_set()
    first, second = lines_of(disturbed, "start")
    assert first["step"] == 0
    assert second["step"] in (2, 3, 4)
    assert logged(disturbed, "epoch") == logged(straight, "epoch")
    assert_same_weights(disturbed, straight, rtol=0, atol=0)
