"""The two parts of a sweep that Ray Tune asks: a searcher for the next trial, a scheduler for whether one goes on.

Both know trials by their number in the sweep, so that what earlier sessions of the sweep have shown counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sam3lora.tune.run.ledger import Ledger, TrialRecord
from sam3lora.tune.run.trial import write_decision
from sam3lora.tune.search.early_stopping import SuccessiveHalving
from sam3lora.tune.search.proposals import Proposer
from sam3lora.tune.space.search_space import SearchSpace

logger = logging.getLogger(__name__)


class LedgerSearcher(Searcher):
    """Starts the unfinished trials of an earlier session first, then new ones; their settings are in the ledger.

    Args:
        begun: Numbers of trials with a record that have not ended.
        new: Numbers of the trials to propose.
        settle: Called with a trial's number when its process has ended; returns the final record.
    """

    def __init__(
        self,
        ledger: Ledger,
        proposer: Proposer,
        *,
        begun: Sequence[int],
        new: Sequence[int],
        may_stop: bool,
        settle: Callable[[int], TrialRecord],
    ) -> None:
        super().__init__()
        self._ledger, self._proposer, self._settle, self._may_stop = ledger, proposer, settle, may_stop
        self._begun, self._new = list(begun), list(new)
        self._numbers: dict[str, int] = {}
        self.ran_out = False

    def suggest(self, trial_id: str) -> Any:
        if not self._begun and not self._propose():
            return Searcher.FINISHED
        number = self._numbers[trial_id] = self._begun.pop(0)
        return {
            "folder": str(self._ledger.folder(number)),
            "number": number,
            "may_stop": self._may_stop,
            "is_base": self._ledger.read(number).is_base,
        }

    def _propose(self) -> bool:
        """Write the record of a new trial, if there is another one."""
        proposal = self._proposer.next(self._new[0]) if self._new else None
        if proposal is None:
            self.ran_out = self.ran_out or bool(self._new)
            self._new.clear()
            return False
        self._begun.append(self._new.pop(0))
        self._ledger.write(
            TrialRecord(
                number=proposal.number,
                values=proposal.values,
                is_base=proposal.is_base,
                trainable_parameters=proposal.trainable_parameters,
            )
        )
        return True

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is not None:
            self._proposer.observe(self._settle(number))

    # Ray Tune saves its searcher to restore it later; a sweep goes on from its ledger instead.
    def save(self, checkpoint_path: str) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


class DecidingScheduler(FIFOScheduler):
    """Tells trials to stop instead of killing them, see `sam3lora.tune.run.trial`.

    The base configuration trains to its end: all other trials are compared with it.
    """

    def __init__(self, space: SearchSpace, rungs: Sequence[int], earlier: Iterable[TrialRecord]) -> None:
        super().__init__()
        self._search = space.search
        self._halving = SuccessiveHalving(rungs, space.early_stopping.reduction_factor)
        for record in earlier:
            for entry in record.history:
                self._falls_behind(record.number, entry)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "epoch" in result:
            number = trial.config["number"]
            stop = self._falls_behind(number, result) and not trial.config["is_base"]
            try:
                write_decision(Path(trial.config["folder"]), result["epoch"], stop=stop)
            except OSError as error:  # the trial goes on without a decision after a while
                logger.warning("the decision on trial %d cannot be written: %s", number, error)
        return TrialScheduler.CONTINUE

    def _falls_behind(self, number: int, measured: dict[str, Any]) -> bool:
        value = measured.get(self._search.metric)
        score = -value if value is not None and self._search.mode == "min" else value
        return self._halving.falls_behind(number, measured["epoch"], score)


def build_scheduler(space: SearchSpace, rungs: Sequence[int], earlier: Iterable[TrialRecord]) -> TrialScheduler:
    """The scheduler of a sweep; without `rungs` there is no early stopping. `earlier` trials may still go on."""
    return DecidingScheduler(space, rungs, earlier) if rungs else FIFOScheduler()
