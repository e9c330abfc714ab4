"""Keys of `training` that decide how long a run is and what it leaves."""

from __future__ import annotations

import pytest

from ...training.run_folder import checkpoints_of, lines_of
from .conftest import acts


def step_numbers(result, kind: str) -> list[int]:
    return [line["step"] for line in lines_of(result, kind)]


@acts("training.num_epochs", "training.logging_steps", "training.eval_steps")
@pytest.mark.parametrize(
    ("kind", "plain", "changed"),
    # Four images, two a step; the first step is always logged, to show that the run has started.
    [("step", [1, 2], [1, 2, 4]), ("epoch", [2], [1, 2, 3, 4])],
)
def test_epochs_and_steps_between_lines(kind, plain, changed, plain_run, changed_run):
    assert [step_numbers(plain_run, kind), step_numbers(changed_run, kind)] == [plain, changed]
    assert all(line["valid_loss"] > 0 for line in lines_of(changed_run, "epoch"))
    assert [plain_run.steps, changed_run.steps] == [2, 4]


@acts("training.max_steps")
def test_max_steps_ends_the_run(run):
    assert run("training.num_epochs=3", "training.max_steps=3").steps == 3


@acts("training.save_minutes")
def test_checkpoints_are_saved_by_time(run):
    saving = ["training.num_epochs=2", "training.save_steps=3", "training.save_minutes=1e-9"]
    assert checkpoints_of(run(*saving)) == [f"step_{step:08}" for step in (2, 3, 4)]


@acts("training.save_steps", "training.save_total_limit")
@pytest.mark.parametrize(("limit", "left"), [(1, [4]), (3, [2, 3, 4])])
def test_checkpoints_are_saved_at_steps_and_the_newest_kept(limit, left, run, plain_run):
    assert checkpoints_of(plain_run) == ["step_00000002"]
    saving = ["training.num_epochs=2", "training.save_steps=1", f"training.save_total_limit={limit}"]
    assert checkpoints_of(run(*saving)) == [f"step_{step:08}" for step in left]
