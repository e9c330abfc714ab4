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


def test_a_trial_that_has_not_begun_has_no_value(tmp_path):
    record = summary(tmp_path)
    assert (record.value, record.epochs, record.history, record.seconds) == (None, 0, [], 0.0)


def test_the_value_is_that_of_the_best_epoch(tmp_path):
    write_lines(
        tmp_path, [{"kind": "start"}, epoch(1, valid_loss=3.0), epoch(2, valid_loss=1.0), epoch(3, valid_loss=2.0)]
    )
    record = summary(tmp_path)
    assert (record.value, record.best_epoch, record.epochs) == (1.0, 2, 3)
    assert record.metrics == {"valid_loss": 1.0}


def test_epochs_without_the_metric_are_passed_over(tmp_path):
    """mAP is measured every other epoch here; zero is a value."""
    write_lines(tmp_path, [epoch(1, valid_loss=1.0), epoch(2, valid_loss=9.0, map=0.0, cgf1=0.1), epoch(3, map=None)])
    record = summary(tmp_path, "map")
    assert (record.value, record.best_epoch, record.epochs) == (0.0, 2, 3)
    assert record.metrics == {"valid_loss": 9.0, "map": 0.0, "cgf1": 0.1}


def test_of_equal_epochs_the_first_counts_as_in_best(tmp_path):
    write_lines(tmp_path, [epoch(1, map=0.5), epoch(2, map=0.5)])
    assert summary(tmp_path, "map").best_epoch == 1


def test_pauses_between_attempts_are_not_time_at_work(tmp_path):
    lines = [
        {"kind": "start", "unix_time": 0.0},
        {**epoch(1, valid_loss=1.0), "unix_time": 5.0},
        {"kind": "start", "unix_time": 1000.0},
        {**epoch(2, valid_loss=1.0), "unix_time": 1003.0},
    ]
    write_lines(tmp_path, lines)
    assert summary(tmp_path).seconds == 8.0


def test_counts_of_vision_passes_add_up_over_attempts(tmp_path):
    """Within an attempt they are running totals."""
    lines = [
        {"kind": "start"},
        epoch(1, valid_loss=1.0, vision_passes=8, features_loaded=0),
        epoch(2, valid_loss=1.0, vision_passes=8, features_loaded=8),
        {"kind": "start"},
        epoch(3, valid_loss=1.0, vision_passes=1, features_loaded=7),
        {"kind": "end", "vision_passes": 2, "features_loaded": 14},
    ]
    write_lines(tmp_path, lines)
    record = summary(tmp_path)
    assert (record.vision_passes, record.features_loaded) == (10, 22)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    write_lines(tmp_path, [epoch(1, valid_loss=1.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "epo')
    assert summary(tmp_path).epochs == 1
