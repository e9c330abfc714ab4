"""Rungs, and what Ray Tune's scheduler decides with what an earlier session has shown."""

from types import SimpleNamespace

import pytest

from sam3lora.tune.early_stopping import rungs
from sam3lora.tune.scheduler import build_scheduler
from sam3lora.tune.trials import TrialRecord


def space(epochs=9, *, scheduler="asha", grace=1, factor=3, metric="valid_loss", every=0):
    return SimpleNamespace(
        base=SimpleNamespace(training=SimpleNamespace(num_epochs=epochs)),
        search=SimpleNamespace(metric=metric, mode="min" if metric == "valid_loss" else "max", every_epochs=every),
        early_stopping=SimpleNamespace(scheduler=scheduler, grace_epochs=grace, reduction_factor=factor),
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (space(1), []),  # nothing to save
        (space(9, scheduler="none"), []),
        (space(9), [1, 3]),  # none at the last epoch
        (space(10), [1, 3, 9]),
        (space(20, grace=None), [2, 6, 18]),
        (space(8, factor=2), [1, 2, 4]),
        (space(20, metric="map", every=4), [4, 12]),  # where mAP is measured
        (space(3, grace=5), []),
    ],
)
def test_rungs(settings, expected):
    assert rungs(settings) == expected


def decide(scheduler, trial_id, epoch, value, *, is_base=False, metric="valid_loss"):
    trial = SimpleNamespace(trial_id=trial_id, config={"is_base": is_base})
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"epoch": epoch, metric: value})


def ended(number, *values, is_base=False):
    history = [{"epoch": epoch, "valid_loss": value} for epoch, value in enumerate(values, 1)]
    return TrialRecord(number, {}, is_base=is_base, status="finished", history=history)


def test_a_trial_that_falls_behind_is_stopped_and_one_that_leads_goes_on():
    scheduler = build_scheduler(space(9), [])
    assert [decide(scheduler, name, 1, loss) for name, loss in [("a", 1.0), ("b", 2.0), ("c", 0.5)]] == [
        "CONTINUE",
        "STOP",
        "CONTINUE",
    ]


def test_trials_of_an_earlier_session_count_at_every_rung():
    earlier = [ended(0, 1.0, 0.9, 0.8, 0.7), ended(1, 5.0)]
    assert decide(build_scheduler(space(9), []), "new", 1, 2.0) == "CONTINUE"
    scheduler = build_scheduler(space(9), earlier)
    assert decide(scheduler, "new", 1, 4.9) == "STOP"
    assert decide(scheduler, "good", 1, 0.5) == "CONTINUE"
    assert decide(scheduler, "late", 3, 0.85) == "STOP"  # the second rung knows trial 0 alone


def test_the_base_configuration_trains_to_its_end():
    scheduler = build_scheduler(space(9), [ended(1, 0.1)])
    assert decide(scheduler, "base", 1, 9.0, is_base=True) == "CONTINUE"


def test_a_trial_at_its_last_epoch_is_left_to_end_by_itself():
    """Stopping it then would cut off what it writes."""
    scheduler = build_scheduler(space(9), [ended(1, *[0.1] * 9)])
    assert decide(scheduler, "slow", 9, 8.0) == "STOP"  # compared at the last rung that it passed, epoch 3
    trial = SimpleNamespace(trial_id="first", config={})
    scheduler = build_scheduler(space(9), [])
    scheduler.on_trial_add(None, trial)
    decisions = [scheduler.on_trial_result(None, trial, {"epoch": epoch, "valid_loss": 1.0}) for epoch in range(1, 10)]
    assert set(decisions) == {"CONTINUE"}


def test_epochs_without_the_metric_decide_nothing():
    settings = space(9, metric="map", every=2)
    scheduler = build_scheduler(settings, [])
    assert decide(scheduler, "a", 2, 0.9, metric="map") == "CONTINUE"
    trial = SimpleNamespace(trial_id="b", config={})
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"epoch": 1, "valid_loss": 3.0}) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial, {"epoch": 2, "map": 0.1}) == "STOP"
