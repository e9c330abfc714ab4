"""Keys of `output` and `logging`."""

from __future__ import annotations

import pytest

from .coco_folder import write_data, write_split
from .conftest import acts

ONE_STEP = "training.max_steps=1"


@acts("output.output_dir")
def test_output_dir_is_the_run_folder(plain_run):
    # The settings of every run here name a folder of its own.
    found = {path.name for path in plain_run.output_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "best", "last", "checkpoints"} <= found


@acts("logging.level")
@pytest.mark.parametrize(("level", "shown"), [("warning", True), ("error", False)])
def test_level_hides_lesser_messages(level, shown, run, tmp_path, caplog):
    folder = write_data(tmp_path / "partly_empty")
    write_split(folder / "train", [("crack",), ()])  # nothing can be asked of the second image
    words = ["data.exhaustive=false", "training.num_negatives=0"]
    run(ONE_STEP, f"training.data_dir={folder}", *words, f"logging.level={level}")
    assert any("left out 1 of 2 images" in message for message in caplog.messages) is shown


@acts("logging.tensorboard")
def test_tensorboard_writes_event_files(plain_run, changed_run):
    found = [list(result.output_dir.glob("tensorboard/events.out.tfevents*")) for result in (plain_run, changed_run)]
    assert [bool(files) for files in found] == [False, True]


@acts("logging.plots")
def test_plots_are_drawn(plain_run, changed_run):
    found = [(result.output_dir / "plots" / "loss.png").exists() for result in (plain_run, changed_run)]
    assert found == [False, True]


@acts("logging.progress")
@pytest.mark.parametrize(
    ("style", "expected"), [("off", None), ("lines", "step 2/2 loss"), ("auto", "step 2/2 loss"), ("bar", "2/2 steps")]
)
def test_progress_is_shown_as_asked(style, expected, run, capsys):
    run(f"logging.progress={style}")
    out = capsys.readouterr().out
    assert (expected in out) if expected else not out
