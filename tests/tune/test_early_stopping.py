"""Rungs, the rule of successive halving, and the scheduler's decisions with the results of an earlier session."""

import random
import threading
import uuid
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import ASHAScheduler

from sam3lora.config.scaling import ScalingSection
from sam3lora.config.training import TrainingSection
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.run.trial import StoppedEarly, await_decision, write_decision
from sam3lora.tune.search.early_stopping import SuccessiveHalving, rungs
from sam3lora.tune.search.ray_tune import build_scheduler


def space(epochs=9, *, scheduler="asha", grace=1, factor=3, metric="valid_loss", every=0):
    return SimpleNamespace(
        base=SimpleNamespace(
            training=TrainingSection(num_epochs=epochs, batch_size=2),
            scaling=ScalingSection(num_workers=3),
        ),
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
    assert rungs(settings) == rungs(settings, 12) == expected


@pytest.mark.parametrize(
    ("max_steps", "images", "expected"),
    [
        (12, 12, [1, 3]),  # two steps an epoch: six epochs
        (5, 12, [1]),  # the third epoch is cut short, and the last
        (2, 12, []),
        (2, None, [1, 3]),  # how long an epoch is, is not known
    ],
)
def test_rungs_lie_where_training_gets_to(max_steps, images, expected):
    """Six images a step: two a batch and worker."""
    settings = space(9)
    settings.base.training = TrainingSection(num_epochs=9, batch_size=2, max_steps=max_steps)
    assert rungs(settings, images) == expected


def epochs_trained(scores, num_epochs, rungs, factor):
    """Epochs of each trial of a sweep, one after the other, with one score at all rungs."""
    halving = SuccessiveHalving(rungs, factor)
    return [
        next((rung for rung in rungs if halving.falls_behind(number, rung, score)), num_epochs)
        for number, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "trained"),
    [
        (range(10), [9] * 10),  # each better than the one before
        (range(10, 0, -1), [9] + [1] * 9),  # each worse
        # The two thirds quantile of 4, 1, 2 is 2.67, so the 3 passes the first rung; the second has seen only the 4.
        # That of 4, 1, 2, 3 is 3 and that of 3, 4 is 3.67: the 3.5 fares alike.
        ([4, 1, 2, 3, 3.5], [9, 1, 1, 3, 3]),
        ([float("nan"), 1, None, 2], [9, 9, 9, 9]),  # what is not measured stops nothing
    ],
)
def test_the_rule_by_hand(scores, trained):
    assert epochs_trained(scores, 9, [1, 3], 3) == trained


@pytest.mark.parametrize(("num_epochs", "rungs", "factor"), [(20, [1, 3, 9], 3), (9, [2, 4, 8], 2), (16, [4], 4)])
def test_the_rule_is_that_of_ray_tune(num_epochs, rungs, factor):
    draw = random.Random(3)
    scores = [draw.random() for _ in range(30)]
    scheduler = ASHAScheduler(
        "epoch", "value", "max", max_t=rungs[-1], grace_period=rungs[0], reduction_factor=factor, stop_last_trials=False
    )

    def train(name, score):
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        for epoch in range(1, num_epochs + 1):
            if scheduler.on_trial_result(None, trial, {"epoch": epoch, "value": score}) == "STOP":
                return epoch
        return num_epochs

    trained = [train(str(number), score) for number, score in enumerate(scores)]
    assert epochs_trained(scores, num_epochs, rungs, factor) == trained
    assert len(set(trained)) > 1


class Trial:
    """A trial as Ray Tune shows it to the scheduler; its folder takes the decisions."""

    def __init__(self, folder, scheduler, number, *, is_base=False):
        self.folder, self.scheduler = folder / str(number), scheduler
        self.folder.mkdir(exist_ok=True)
        config = {"number": number, "is_base": is_base, "folder": str(self.folder)}
        self.tune_trial = SimpleNamespace(trial_id=uuid.uuid4().hex, config=config)
        scheduler.on_trial_add(None, self.tune_trial)

    def is_stopped_after(self, epoch, **metrics):
        assert self.scheduler.on_trial_result(None, self.tune_trial, {"epoch": epoch, **metrics}) == "CONTINUE"
        try:
            await_decision(self.folder, epoch, longest_s=0)
        except StoppedEarly:
            return True
        return False


def ended(number, *values, is_base=False):
    history = [{"epoch": epoch, "valid_loss": value} for epoch, value in enumerate(values, 1)]
    return TrialRecord(number, {}, is_base=is_base, status="finished", history=history)


def scheduler_of(settings, *earlier):
    return build_scheduler(settings, rungs(settings), earlier)


def test_a_trial_that_falls_behind_is_stopped_unless_it_is_the_base_or_ends(tmp_path):
    scheduler = scheduler_of(space(9))
    first, *others = (Trial(tmp_path, scheduler, number) for number in range(3))
    assert not any(first.is_stopped_after(epoch, valid_loss=1.0) for epoch in range(1, 10))
    assert [trial.is_stopped_after(1, valid_loss=loss) for trial, loss in zip(others, [2, 0.5])] == [True, False]
    assert not Trial(tmp_path, scheduler, 3, is_base=True).is_stopped_after(1, valid_loss=9.0)
    gone = Trial(tmp_path, scheduler, 4)
    gone.folder.rmdir()  # does not end the sweep
    assert not gone.is_stopped_after(1, valid_loss=9.0)


def test_trials_of_an_earlier_session_count_at_every_rung(tmp_path):
    assert not Trial(tmp_path, scheduler_of(space(9)), 7).is_stopped_after(1, valid_loss=4.9)
    scheduler = scheduler_of(space(9), ended(0, 1.0, 0.9, 0.8, 0.7), ended(1, 5.0))
    assert Trial(tmp_path, scheduler, 2).is_stopped_after(1, valid_loss=4.9)
    good = Trial(tmp_path, scheduler, 3)
    assert not good.is_stopped_after(1, valid_loss=0.5)
    assert not good.is_stopped_after(2, valid_loss=9.0)  # no rung
    assert good.is_stopped_after(3, valid_loss=0.85)  # the second rung knows trial 0 alone, with 0.8


def test_a_trial_that_goes_on_is_not_judged_again_at_a_rung_that_it_has_passed(tmp_path):
    """It was the best at its first epoch; better ones have come since."""
    scheduler = scheduler_of(space(9), ended(0, 3.0, 2.5), ended(1, 1.0), ended(2, 1.1), ended(3, 1.2))
    resumed = Trial(tmp_path, scheduler, 0)
    assert not resumed.is_stopped_after(2, valid_loss=2.4)
    assert Trial(tmp_path, scheduler, 4).is_stopped_after(1, valid_loss=2.4)  # a new one is


@pytest.mark.parametrize("missing", [{}, {"map": None}])
def test_epochs_without_the_metric_decide_nothing(tmp_path, missing):
    scheduler = scheduler_of(space(9, metric="map", every=2))
    assert not Trial(tmp_path, scheduler, 0).is_stopped_after(2, map=0.9)
    trial = Trial(tmp_path, scheduler, 1)
    assert not trial.is_stopped_after(2, valid_loss=3.0, **missing)
    assert trial.is_stopped_after(3, map=0.1)


def test_a_trial_waits_for_the_decision_on_its_epoch(tmp_path):
    """That of an earlier epoch is none on this one; without any the trial goes on after a while."""
    write_decision(tmp_path, 1, stop=False)
    later = threading.Timer(0.3, write_decision, (tmp_path, 2), {"stop": True})
    later.start()
    with pytest.raises(StoppedEarly, match="after epoch 2"):
        await_decision(tmp_path, 2)
    later.join()
    write_decision(tmp_path, 3, stop=False)  # what was decided stays
    with pytest.raises(StoppedEarly):
        await_decision(tmp_path, 0)
    await_decision(tmp_path / "nowhere", 1, longest_s=0.1)
