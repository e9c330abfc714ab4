"""A trial's record, completed from its run folder."""

import json

from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.run.trial_summary import summarise
from sam3lora.tune.space.search_space import Search


def write_lines(folder, lines):
    text = "".join(json.dumps({"unix_time": 100.0 + number, **line}) + "\n" for number, line in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text)


def epoch(number, **values):
    return {"kind": "epoch", "epoch": number, "step": number, "train_loss": 1.0, **values}


def summary(folder, metric="valid_loss"):
    record = TrialRecord(3, {"lora.rank": 4})
    summarise(record, folder, Search(metric=metric))
    return record


def test_the_value_is_that_of_the_best_epoch_so_far(tmp_path):
    record = summary(tmp_path)
    assert (record.value, record.epochs, record.history, record.seconds) == (None, 0, [], 0.0)
    losses = [epoch(number, valid_loss=loss) for number, loss in enumerate((3.0, 1.0, 1.0), start=1)]
    write_lines(tmp_path, [{"kind": "start"}, *losses])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "epo')  # a line that is being written is left for later
    record = summary(tmp_path)
    assert (record.value, record.best_epoch, record.epochs) == (1.0, 2, 3)  # of equal epochs the first, as in best/
    assert record.metrics == {"valid_loss": 1.0}


def test_epochs_without_the_metric_are_passed_over(tmp_path):
    """mAP is measured every other epoch here; zero is a value."""
    write_lines(tmp_path, [epoch(1, valid_loss=1.0), epoch(2, valid_loss=9.0, map=0.0, cgf1=0.1), epoch(3, map=None)])
    record = summary(tmp_path, "map")
    assert (record.value, record.best_epoch, record.epochs) == (0.0, 2, 3)
    assert record.metrics == {"valid_loss": 9.0, "map": 0.0, "cgf1": 0.1}


def test_attempts_add_up_without_the_pauses_between_them(tmp_path):
    """Within an attempt counts of vision passes are running totals."""
    lines = [
        {"kind": "start", "unix_time": 0.0},
        epoch(1, valid_loss=1.0, vision_passes=8, features_loaded=0, unix_time=3.0),
        epoch(2, valid_loss=1.0, vision_passes=8, features_loaded=8, unix_time=5.0),
        {"kind": "start", "unix_time": 1000.0},
        epoch(3, valid_loss=1.0, vision_passes=1, features_loaded=7, unix_time=1002.0),
        {"kind": "end", "vision_passes": 2, "features_loaded": 14, "unix_time": 1003.0},
    ]
    write_lines(tmp_path, lines)
    record = summary(tmp_path)
    assert (record.vision_passes, record.features_loaded, record.seconds) == (10, 22, 8.0)
