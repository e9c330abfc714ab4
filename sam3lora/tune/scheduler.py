"""Ray Tune's scheduler for a sweep, told what trials of earlier sessions have shown."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from sam3lora.tune.early_stopping import rungs
from sam3lora.tune.space import SearchSpace
from sam3lora.tune.trials import TrialRecord


class KeepBase(AsyncHyperBandScheduler):
    """ASHA that lets the base configuration train to its end: it is what all others are compared with."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config.get("is_base") else action


def build_scheduler(space: SearchSpace, earlier: Iterable[TrialRecord]) -> TrialScheduler:
    """The scheduler for Ray Tune.

    Args:
        space: what to compare, and how often.
        earlier: ended trials; those that go on report their past epochs themselves.
    """
    milestones = rungs(space)
    if not milestones:
        return FIFOScheduler()
    scheduler = KeepBase(
        time_attr="epoch",
        metric=space.search.metric,
        mode=space.search.mode,
        grace_period=milestones[0],
        max_t=milestones[-1] + 0.5,  # type: ignore[arg-type]  # the last rung must not be lost to rounding
        reduction_factor=space.early_stopping.reduction_factor,
        stop_last_trials=False,  # a trial at its last epoch ends by itself, with everything written
    )
    for record in earlier:
        trial = SimpleNamespace(trial_id=f"earlier_{record.number}", config={"is_base": record.is_base})
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        for entry in record.history:
            scheduler.on_trial_result(None, trial, entry)
    return scheduler
