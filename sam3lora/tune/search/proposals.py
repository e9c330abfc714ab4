"""From samples to trials: what a sample would train is checked before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.tune.estimate.parameter_budget import ParameterCounter
from sam3lora.tune.run.ledger import Rejection, TrialRecord
from sam3lora.tune.search.samplers import RandomSampler, Sampler, build_sampler, grid_points
from sam3lora.tune.space.parameters import value_text
from sam3lora.tune.space.search_space import BYTES_A_PARAMETER, SearchSpace

MAX_ATTEMPTS = 500
_SAMPLES_AT_START = 200


@dataclass(frozen=True)
class Proposal:
    """A trial that may be trained.

    Attributes:
        values: Of every parameter.
        config: What they make of the base configuration, see `SearchSpace.config_of`.
        trainable_parameters: Of the adapter.
        is_base: Whether it is the base configuration, unchanged.
    """

    number: int
    values: dict[str, Any]
    config: Config
    trainable_parameters: int
    is_base: bool


class Proposer:
    """Turns samples into trials: over the budget, impossible or tried before, a sample gives way to another one."""

    def __init__(
        self,
        space: SearchSpace,
        *,
        taken: Iterable[TrialRecord] = (),
        on_reject: Callable[[Rejection], None] = lambda rejection: None,
        sampler: Sampler | None = None,
        rejected: Iterable[Rejection] = (),
    ) -> None:
        """Check the base and that some sample is possible.

        Args:
            taken: trials that exist, ended or not.
            on_reject: gets each rejected sample, once.
            sampler: has observed the trials in ``taken`` that have ended; None makes one that does.
            rejected: known from an earlier session, not reported again.

        Raises:
            UserError: the base model is not found, the base configuration is impossible or over the budget, or no
                sample is within it.
        """
        self._space, self._on_reject = space, on_reject
        self._counter = ParameterCounter(space.base)
        self._limit = space.constraints.parameter_limit
        taken = list(taken)
        self._sampler = sampler or build_sampler(space)
        if sampler is None:
            for record in taken:
                if record.has_ended:
                    self._sampler.observe(record)
        self._tried = {_fingerprint(self._config_of(record)) for record in taken}
        self._seen = {_canonical(record.values) for record in taken if not record.is_base}
        self._seen |= {_canonical(rejection.values) for rejection in rejected}
        self._base_trained = any(record.is_base for record in taken)
        if space.search.include_base:
            self._check_base()
        self._check_samples()

    def next(self, number: int) -> Proposal | None:
        """The next trial to train; None when nothing new is left or `MAX_ATTEMPTS` samples in a row were rejected."""
        if number == 0 and self._space.search.include_base and not self._base_trained:
            self._base_trained = True
            base = self._space.base
            return self._accept(number, self._space.base_values(), base, self._counter.count(base), is_base=True)
        for attempt in range(MAX_ATTEMPTS):
            if self._space.size is not None and len(self._seen) >= self._space.size:
                return None
            values = self._sampler.propose(number, attempt)
            if values is None:
                return None
            known = _canonical(values) in self._seen
            self._seen.add(_canonical(values))
            checked = self._check(number, values)
            if not isinstance(checked, Rejection):
                return self._accept(number, values, *checked)
            self._sampler.reject(number, values)
            # The base is a point of many a grid, and its result stands for both.
            is_loss = checked.kind != "already tried" or self._space.search.algorithm != "grid"
            if is_loss and not known:
                self._on_reject(checked)
        return None

    def _accept(
        self, number: int, values: dict[str, Any], config: Config, parameters: int, *, is_base: bool = False
    ) -> Proposal:
        self._tried.add(_fingerprint(config))
        return Proposal(number, values, config, parameters, is_base)

    def _config_of(self, record: TrialRecord) -> Config:
        return self._space.base if record.is_base else self._space.config_of(record.values)

    def _check(self, number: int, values: dict[str, Any]) -> tuple[Config, int] | Rejection:
        """What a sample would train, or why it is not trained."""
        try:
            config = self._space.config_of(values)
            parameters = self._counter.count(config)
        except UserError as error:
            return Rejection(number, values, "impossible settings", str(error))
        if _fingerprint(config) in self._tried:
            return Rejection(number, values, "already tried", "a trial has these settings", parameters)
        if self._limit is not None and parameters > self._limit:
            reason = f"{parameters_text(parameters)}, over the bound of {parameters_text(self._limit)}"
            return Rejection(number, values, "over budget", reason, parameters)
        return config, parameters

    def _check_base(self) -> None:
        parameters = self._counter.count(self._space.base)
        if self._limit is not None and parameters > self._limit:
            raise UserError(
                f"the base configuration {self._space.base_name} is over the budget: it has "
                f"{parameters_text(parameters)}, allowed are {parameters_text(self._limit)}. Raise the bound under "
                "constraints, make the base smaller under set, or leave it out with search.include_base: false"
            )

    def _check_samples(self) -> None:
        """Look for one sample that may be trained, so that a sweep without any does not start."""
        rejections = []
        tried, self._tried = self._tried, set()
        for values in islice(self._some_samples(), _SAMPLES_AT_START):
            checked = self._check(0, values)
            if not isinstance(checked, Rejection):
                break
            rejections.append(checked)
        else:
            raise UserError(_why_none(rejections, self._limit))
        self._tried = tried

    def _some_samples(self) -> Iterator[dict[str, Any]]:
        if self._space.search.algorithm == "grid":
            return grid_points(self._space)
        sampler = RandomSampler(self._space)
        return (sampler.propose(number, attempt=0) for number in count(1))


def _why_none(rejections: list[Rejection], limit: int | None) -> str:
    over = [found.trainable_parameters for found in rejections if found.trainable_parameters is not None]
    if not over or limit is None:
        return f"none of {len(rejections)} samples is possible; the first: {rejections[0].reason}"
    return (
        f"none of {len(rejections)} samples is within {parameters_text(limit)}; the smallest has "
        f"{parameters_text(min(over))}: raise the bound under constraints, or let the parameters make smaller adapters"
    )


def parameters_text(parameters: int) -> str:
    """A number of trainable parameters with the size of its adapter: 1,024 trainable parameters (0.004 MB)."""
    return f"{parameters:,} trainable parameters ({value_text(parameters * BYTES_A_PARAMETER / 1e6)} MB)"


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _fingerprint(config: Config) -> str:
    """Equal for configurations that train the same adapter in the same way."""
    return config.model_dump_json(exclude={"output", "logging"})
