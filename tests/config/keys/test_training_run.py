"""Keys of `training` that decide how long a run is and what it leaves."""

from __future__ import annotations

from .conftest import lines_of
from .registry import acts


def checkpoints(result) -> list[str]:
    return sorted(path.name for path in (result.output_dir / "checkpoints").glob("step_*"))


def step_numbers(result, kind: str) -> list[int]:
    return [line["step"] for line in lines_of(result, kind)]


@acts("training.num_epochs")
def test_num_epochs_are_passes_over_the_images(plain_run, changed_run):
    # Four images, two a step.
    assert [plain_run.steps, changed_run.steps] == [2, 4]


@acts("training.max_steps")
def test_max_steps_ends_the_run(run):
    assert run("training.num_epochs=3", "training.max_steps=3").steps == 3


@acts("training.logging_steps")
def test_logging_steps_thin_the_log(plain_run, changed_run):
    assert step_numbers(plain_run, "step") == [1, 2]
    # The first step is always logged, to show that the run has started.
    assert step_numbers(changed_run, "step") == [1, 2, 4]


@acts("training.eval_steps")
def test_eval_steps_are_between_validations(plain_run, changed_run):
    assert step_numbers(plain_run, "epoch") == [2]
    assert step_numbers(changed_run, "epoch") == [1, 2, 3, 4]
    assert all(line["valid_loss"] > 0 for line in lines_of(changed_run, "epoch"))


@acts("training.save_steps")
def test_save_steps_are_between_checkpoints(plain_run, changed_run):
    assert checkpoints(plain_run) == ["step_00000002"]
    assert checkpoints(changed_run) == ["step_00000003", "step_00000004"]


@acts("training.save_total_limit")
def test_save_total_limit_keeps_the_newest(run, changed_run):
    assert len(checkpoints(changed_run)) == 2
    one = run("training.num_epochs=2", "training.save_steps=1", "training.save_total_limit=1")
    assert checkpoints(one) == ["step_00000004"]


@acts("training.early_stopping_patience")
def test_early_stopping_ends_a_run_that_does_not_improve(run):
    # At this rate no float32 value of the forward changes, so no validation is better than the first.
    stuck = ["training.num_epochs=5", "training.learning_rate=1e-20"]
    assert run(*stuck).steps == 10
    result = run(*stuck, "training.early_stopping_patience=2")
    assert result.steps == 6
    assert [line["best_step"] for line in lines_of(result, "early_stop")] == [2]
