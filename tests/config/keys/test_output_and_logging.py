"""Keys of `output` and `logging`."""

from __future__ import annotations

import pytest

from .coco_folder import write_data, write_split
from .registry import acts

ONE_STEP = "training.max_steps=1"


@acts("output.output_dir")
def test_output_dir_is_the_run_folder(run, tmp_path):
    run(ONE_STEP, f"output.output_dir={tmp_path / 'here'}")
    found = {path.name for path in (tmp_path / "here").iterdir()}
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
@pytest.mark.parametrize("wanted", [False, True])
def test_tensorboard_writes_event_files(wanted, run):
    result = run(ONE_STEP, f"logging.tensorboard={str(wanted).lower()}")
    assert bool(list(result.output_dir.glob("tensorboard/events.out.tfevents*"))) is wanted


@acts("logging.plots")
@pytest.mark.parametrize("wanted", [False, True])
def test_plots_are_drawn(wanted, run):
    result = run(ONE_STEP, f"logging.plots={str(wanted).lower()}")
    assert (result.output_dir / "plots" / "loss.png").exists() is wanted


@acts("logging.progress")
@pytest.mark.parametrize(
    ("style", "expected"), [("off", None), ("lines", "step 2/2 loss"), ("auto", "step 2/2 loss"), ("bar", "2/2 steps")]
)
def test_progress_is_shown_as_asked(style, expected, run, capsys):
    run(f"logging.progress={style}")
    out = capsys.readouterr().out
    assert (expected in out) if expected else not out
