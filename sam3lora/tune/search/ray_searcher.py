"""What Ray Tune asks for its next trial: the begun ones of an earlier session first, then new proposals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from sam3lora.tune.run.ledger import Ledger, TrialRecord
from sam3lora.tune.search.proposals import Proposer
from sam3lora.tune.search.samplers import Sampler

logger = logging.getLogger(__name__)


class LedgerSearcher(Searcher):
    """Gives Ray Tune the numbers of trials; their settings are in the ledger before a trial starts.

    Args:
        ledger: where new trials are written down.
        proposer: makes the settings of new trials.
        sampler: is told what came of each trial.
        begun: trials with a record that have not ended.
        may_stop: whether trials are given up early.
        new: numbers of the trials to propose.
        settle: called with a trial's number when its process has ended; returns the record as it then is.
    """

    def __init__(
        self,
        ledger: Ledger,
        proposer: Proposer,
        sampler: Sampler,
        *,
        begun: Sequence[int],
        new: Sequence[int],
        may_stop: bool,
        settle: Callable[[int], TrialRecord],
    ) -> None:
        super().__init__()
        self._ledger, self._proposer, self._sampler, self._settle = ledger, proposer, sampler, settle
        self._begun, self._new = list(begun), list(new)
        self._may_stop = may_stop
        self._numbers: dict[str, int] = {}
        self.ran_out = False

    def suggest(self, trial_id: str) -> Any:
        if self._begun:
            return self._start(trial_id, self._begun.pop(0))
        if not self._new:
            return Searcher.FINISHED
        number = self._new.pop(0)
        proposal = self._proposer.next(number)
        if proposal is None:
            self.ran_out = True
            self._new.clear()
            return Searcher.FINISHED
        self._ledger.write(
            TrialRecord(
                number=number,
                values=proposal.values,
                is_base=proposal.is_base,
                trainable_parameters=proposal.trainable_parameters,
            )
        )
        return self._start(trial_id, number)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is not None:
            self._sampler.observe(self._settle(number))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing to do: what a trial measures is in its run folder."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its ledger, not from Ray Tune's state")

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune writes its searcher to disk for a restore that is never made."""
        return {}

    def _start(self, trial_id: str, number: int) -> dict[str, Any]:
        self._numbers[trial_id] = number
        return {
            "sweep_dir": str(self._ledger.sweep_dir),
            "folder": str(self._ledger.folder(number)),
            "number": number,
            "may_stop": self._may_stop,
            "is_base": self._ledger.read(number).is_base,
        }
