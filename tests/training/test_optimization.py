"""Learning rates by hand, optimizer groups, and which dropout is active."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam3lora.training.optimization import (
    build_optimizer,
    idle_adapters,
    learning_rate_factor,
    set_learning_rate,
    set_training_mode,
)

from .two_workers import make_trainer


def factors(schedule: str, total: int, warmup: int) -> list[float]:
    return [learning_rate_factor(schedule, step, total_steps=total, warmup_steps=warmup) for step in range(total)]


def test_constant_rises_and_stays():
    assert factors("constant", 6, 3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_cosine_falls_to_one_percent():
    # After the warm-up: 1 at the first step, half way between 1 and 0.01 in the middle, 0.01 at the last.
    assert factors("cosine", 7, 2) == pytest.approx([0.5, 1, 1, 0.8550, 0.505, 0.1550, 0.01], abs=1e-4)


def test_inverse_sqrt_cools_down():
    # 1 / sqrt(1 + t / 4) after 4 steps of warm-up; the last 4 steps are multiplied by 1, 3/4, 2/4, 1/4.
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.8944, 0.8165, 0.7559, 0.7071, 0.6667 * 0.75, 0.6325 * 0.5, 0.6030 * 0.25]
    assert factors("inverse_sqrt", 12, 4) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "inverse_sqrt"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 100), (2, 100), (5, 0), (9, 100)])
def test_every_step_of_a_short_run_learns(schedule, total, warmup):
    # Warm-up longer than the run takes half of it: the peak is reached, and no step is without effect.
    values = factors(schedule, total, warmup)
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = nn.Linear(2, 3)
        self.detr_decoder = nn.Conv2d(1, 1, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_by_rate_and_decay():
    # Matrices and kernels decay, vectors do not; a component may have its own rate; frozen parameters are left out.
    model = Model()
    optimizer = build_optimizer(
        model, learning_rate=0.1, component_learning_rates={"detr_decoder": 0.01}, weight_decay=0.5, betas=(0.8, 0.9)
    )
    settings = {
        id(parameter): (group["lr"], group["weight_decay"], group["betas"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert settings == {
        id(model.vision_encoder.weight): (0.1, 0.5, (0.8, 0.9)),
        id(model.vision_encoder.bias): (0.1, 0.0, (0.8, 0.9)),
        id(model.detr_decoder.weight): (0.01, 0.5, (0.8, 0.9)),
        id(model.detr_decoder.bias): (0.01, 0.0, (0.8, 0.9)),
    }


def test_schedule_multiplies_each_peak():
    # Setting the rate again starts from the peak and not from the last rate.
    optimizer = build_optimizer(Model(), learning_rate=0.1, component_learning_rates={"detr_decoder": 0.01})
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.5)
    assert sorted({round(group["lr"], 6) for group in optimizer.param_groups}) == [0.005, 0.05]


def test_component_rates_of_an_adapter(make_config):
    # training.component_learning_rates finds the component behind PEFT's names.
    config = make_config("training.component_learning_rates={detr_decoder: 1e-5}", learning_rate=1e-3)
    worker = make_trainer(config)
    names = {id(parameter): name for name, parameter in worker.model.named_parameters()}
    rates = {names[id(p)]: group["peak_lr"] for group in worker.optimizer.param_groups for p in group["params"]}
    assert any(".detr_decoder." in name for name in rates)
    for name, rate in rates.items():
        assert rate == (1e-5 if ".detr_decoder." in name else 1e-3), name


@pytest.mark.parametrize("model_dropout", [False, True])
def test_dropout_of_the_adapter_only(make_config, model_dropout):
    # Unless model_dropout, SAM 3's own dropout is off in training while the adapter's is on.
    model = make_trainer(make_config("lora.dropout=0.5")).model
    set_training_mode(model, model_dropout=model_dropout)
    modes = {
        kind: {m.training for name, m in model.named_modules() if isinstance(m, nn.Dropout) and (kind in name)}
        for kind in (".lora_dropout.", ".text_mlp_dropout", "attn_dropout")
    }
    assert modes == {".lora_dropout.": {True}, ".text_mlp_dropout": {model_dropout}, "attn_dropout": {model_dropout}}


def test_idle_adapters_are_named(make_config):
    # A module is idle when its B has no gradient or a zero one.
    model = make_trainer(make_config()).model
    parameters = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    assert idle_adapters(model) == []
    box_head, projection = "detr_decoder.box_head.layer1", "mask_decoder.instance_projection"
    parameters[f"base_model.model.{box_head}.lora_B.default.weight"].grad = None
    parameters[f"base_model.model.{projection}.lora_B.default.weight"].grad.zero_()
    assert idle_adapters(model) == [box_head, projection]
