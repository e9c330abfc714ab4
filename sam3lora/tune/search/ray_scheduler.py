"""Ray Tune's scheduler for a sweep, told what trials of earlier sessions have shown."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from sam3lora.tune.run.decisions import write_decision
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.space.reader import SearchSpace

logger = logging.getLogger(__name__)


class DecidingScheduler(AsyncHyperBandScheduler):
    """ASHA that tells trials to stop instead of killing them, see `decisions`.

    Trials go by their number in the sweep, so that one that goes on after a break is not judged again at a rung that it
    has passed. The base configuration is trained to its end: it is what all others are compared with.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _by_number(trial.config["number"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "epoch" in result:
            stop = self.falls_behind(trial.config["number"], result) and not trial.config["is_base"]
            try:
                write_decision(Path(trial.config["folder"]), result["epoch"], stop=stop)
            except OSError as error:  # the trial goes on by itself after a while
                logger.warning("trial %d was not told whether to go on: %s", trial.config["number"], error)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing to do: every epoch has been looked at."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Nothing to do: what a failed trial measured before still counts."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing to do."""

    def remember(self, record: TrialRecord) -> None:
        """Take over what a trial of an earlier session measured, without deciding on it again."""
        super().on_trial_add(None, _by_number(record.number))  # type: ignore[arg-type]
        for entry in record.history:
            self.falls_behind(record.number, entry)

    def falls_behind(self, number: int, result: dict[str, Any]) -> bool:
        """Whether a trial is not among the best at a rung that it has reached with this result."""
        measured = {name: value for name, value in result.items() if value is not None}
        action = super().on_trial_result(None, _by_number(number), measured)  # type: ignore[arg-type]
        return action == TrialScheduler.STOP


def build_scheduler(space: SearchSpace, rungs: Sequence[int], earlier: Iterable[TrialRecord]) -> TrialScheduler:
    """The scheduler for Ray Tune.

    Args:
        space: what to compare.
        rungs: after which epochs; none for no early stopping.
        earlier: trials of earlier sessions, also those that go on.
    """
    if not rungs:
        return FIFOScheduler()
    scheduler = DecidingScheduler(
        time_attr="epoch",
        metric=space.search.metric,
        mode=space.search.mode,
        grace_period=rungs[0],
        max_t=rungs[-1] + 0.5,  # type: ignore[arg-type]  # the last rung must not be lost to rounding
        reduction_factor=space.early_stopping.reduction_factor,
        stop_last_trials=False,  # a trial at its last epoch ends by itself
    )
    for record in earlier:
        scheduler.remember(record)
    return scheduler


def _by_number(number: int) -> Any:
    return SimpleNamespace(trial_id=f"trial_{number}")
