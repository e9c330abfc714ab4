"""Learning rates by hand, optimizer groups, and which dropout is active."""

from __future__ import annotations

import pytest
from torch import nn

from sam3lora.training.optimization import (
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)


def factors(schedule: str, total: int, warmup: int) -> list[float]:
    return [learning_rate_factor(schedule, step, total_steps=total, warmup_steps=warmup) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 3, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        # After the warm-up: 1 at the first step, half way between 1 and 0.01 in the middle, 0.01 at the last.
        ("cosine", 2, [0.5, 1, 1, 0.8550, 0.505, 0.1550, 0.01]),
        # 1 / sqrt(1 + t / 4) after 4 steps of warm-up; the last 4 steps are multiplied by 1, 3/4, 2/4, 1/4.
        (
            "inverse_sqrt",
            4,
            [0.25, 0.5, 0.75, 1, 1, 0.8944, 0.8165, 0.7559, 0.7071, 0.6667 * 0.75, 0.6325 * 0.5, 0.6030 * 0.25],
        ),
    ],
)
def test_course_of_the_rate(schedule, warmup, expected):
    assert factors(schedule, len(expected), warmup) == pytest.approx(expected, abs=1e-4)


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
