"""A sampler that learns from earlier trials: Optuna's tree-structured Parzen estimator (TPE).

TPE: https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization. The study is kept in memory and
rebuilt from the trials that have ended, so the ledger stays the only record.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sam3lora.errors import UserError
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.search.samplers import GridCycle, RandomSampler, Sampler
from sam3lora.tune.space.parameters import Choice, FreeParameter
from sam3lora.tune.space.search_space import SearchSpace

if TYPE_CHECKING:
    import optuna

_FEWEST_RANDOM, _MOST_RANDOM = 4, 10
_ATTEMPTS = 20  # TPE learns nothing from rejected samples: after so many for one trial the next are random


class OptunaSampler(Sampler):
    """TPE over the parameters that are drawn; `grid` parameters are visited evenly instead.

    Optuna sees a trial that was stopped early as pruned, with its values by epoch. The objective `quality_and_size` has
    two values, the metric and the number of trainable parameters; Optuna cannot prune such trials, so a stopped one
    counts with the value that it had.
    """

    def __init__(self, space: SearchSpace, ended: Sequence[TrialRecord] = ()) -> None:
        """Make a study of the trials that have ended. Raises UserError if Optuna is not installed."""
        try:
            import optuna
        except ImportError:
            raise UserError(
                "search.algorithm optuna needs Optuna: pip install 'sam3lora[tune]', or choose random"
            ) from None
        self._optuna, self._space = optuna, space
        self._cycle, self._random = GridCycle(space), RandomSampler(space)
        self._distributions = {
            key: _distribution(optuna, item) for key, item in space.free.items() if item.kind != "grid"
        }
        self._with_size = space.search.objective == "quality_and_size"
        self._asked: dict[int, optuna.Trial] = {}
        search = space.search
        seed = int(np.random.SeedSequence([search.seed, len(ended)]).generate_state(1)[0])
        random_trials = min(max(space.num_trials // 3, _FEWEST_RANDOM), _MOST_RANDOM)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Several trials run at the same time: constant_liar keeps their samples apart.
            sampler = optuna.samplers.TPESampler(n_startup_trials=random_trials, constant_liar=True, seed=seed)
        quality: Literal["minimize", "maximize"] = "minimize" if search.mode == "min" else "maximize"
        directions: list[Literal["minimize", "maximize"]] = [quality, "minimize"] if self._with_size else [quality]
        self._study = optuna.create_study(sampler=sampler, directions=directions)
        for record in ended:
            self._study.add_trial(self._as_trial(record))

    def propose(self, number: int, attempt: int) -> dict[str, Any] | None:
        if attempt >= _ATTEMPTS:
            self._study.enqueue_trial(self._params(self._random.propose(number, attempt)) or {})
        trial = self._asked[number] = self._study.ask(self._distributions)
        drawn = {key: self._value_of(key, raw) for key, raw in trial.params.items()}
        return self._space.complete(drawn | self._cycle.point(number, attempt))

    def observe(self, record: TrialRecord) -> None:
        trial = self._asked.pop(record.number, None)
        if trial is None:  # it was proposed in an earlier session
            self._study.add_trial(self._as_trial(record))
            return
        for epoch, value in self._history(record):
            trial.report(value, epoch)
        state, values = self._outcome(record)
        self._study.tell(trial, values, state=state)

    def reject(self, number: int) -> None:
        self._study.tell(self._asked.pop(number), state=self._optuna.trial.TrialState.FAIL)

    def _value_of(self, key: str, raw: Any) -> Any:
        item = self._space.free[key]
        if isinstance(item, Choice):
            return item.values[raw]
        return raw if item.kind == "randint" else item.rounded(raw)

    def _params(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Optuna's form of values; None if one is not in the space, which can happen for the base's."""
        params: dict[str, Any] = {}
        for key in self._distributions:
            item = self._space.free[key]
            if key not in values or not item.has(values[key]):
                return None
            params[key] = item.values.index(values[key]) if isinstance(item, Choice) else values[key]
        return params

    def _outcome(self, record: TrialRecord) -> tuple[Any, list[float] | None]:
        """State and values of a trial that has ended."""
        states = self._optuna.trial.TrialState
        if record.status == "failed" or record.value is None or not math.isfinite(record.value):
            return states.FAIL, None
        if self._with_size:
            return states.COMPLETE, [record.value, float(record.trainable_parameters)]
        if record.status == "stopped":
            return states.PRUNED, None
        return states.COMPLETE, [record.value]

    def _history(self, record: TrialRecord) -> list[tuple[int, float]]:
        """(epoch, metric) of each validation; none with two objectives, for which Optuna accepts none."""
        metric = self._space.search.metric
        if self._with_size:
            return []
        values = {entry.get("epoch"): entry.get(metric) for entry in record.history}
        return [(epoch, value) for epoch, value in values.items() if epoch is not None and value is not None]

    def _as_trial(self, record: TrialRecord) -> optuna.trial.FrozenTrial:
        params = self._params(record.values)
        state, values = self._outcome(record)
        return self._optuna.trial.create_trial(
            state=state,
            values=values,
            params=params or {},
            distributions=self._distributions if params else {},
            intermediate_values=dict(self._history(record)),
        )


def _distribution(optuna: Any, item: FreeParameter) -> Any:
    """The distribution of a parameter; of a choice that of its index, as Optuna accepts neither lists nor mappings."""
    if isinstance(item, Choice):
        return optuna.distributions.CategoricalDistribution(range(len(item.values)))
    if item.kind == "randint":
        return optuna.distributions.IntDistribution(item.low, item.high)
    return optuna.distributions.FloatDistribution(item.low, item.high, log=item.is_log)
