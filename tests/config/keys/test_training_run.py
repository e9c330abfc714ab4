"""Keys of `training` that decide how long a run is and what it leaves."""

from __future__ import annotations

from .conftest import lines_of
from .registry import acts


def checkpoints(result) -> list[str]:
    return sorted(path.name for path in (result.output_dir / "checkpoints").glob("step_*"))


def step_numbers(result, kind: str) -> list[int]:
    return [line["step"] for line in lines_of(result, kind)]


@acts("training.num_epochs")
def test_num_epochs_are_passes_over_the_images(run):
    # Four images, two a step.
    assert [run(f"training.num_epochs={epochs}").steps for epochs in (1, 2)] == [2, 4]


@acts("training.max_steps")
def test_max_steps_ends_the_run(run):
    assert run("training.num_epochs=3", "training.max_steps=3").steps == 3


@acts("training.logging_steps")
def test_logging_steps_thin_the_log(run):
    assert step_numbers(run("training.num_epochs=2"), "step") == [1, 2, 3, 4]
    # The first step is always there, to see that a run has started.
    assert step_numbers(run("training.num_epochs=2", "training.logging_steps=2"), "step") == [1, 2, 4]


@acts("training.eval_steps")
def test_eval_steps_are_between_validations(run):
    assert step_numbers(run(), "epoch") == [2]
    result = run("training.eval_steps=1")
    assert step_numbers(result, "epoch") == [1, 2]
    assert all(line["valid_loss"] > 0 for line in lines_of(result, "epoch"))


@acts("training.save_steps")
def test_save_steps_are_between_checkpoints(run):
    assert checkpoints(run()) == ["step_00000002"]
    assert checkpoints(run("training.save_steps=1")) == ["step_00000001", "step_00000002"]


@acts("training.save_total_limit")
def test_save_total_limit_keeps_the_newest(run):
    two = run("training.num_epochs=2", "training.save_steps=1", "training.save_total_limit=2")
    assert checkpoints(two) == ["step_00000003", "step_00000004"]
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
