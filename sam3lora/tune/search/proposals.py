"""From samples to trials: each sample is checked before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.tune.estimate.parameter_budget import count_trainable, meta_model
from sam3lora.tune.run.ledger import Rejection, TrialRecord
from sam3lora.tune.search.optuna_sampler import OptunaSampler
from sam3lora.tune.search.samplers import GridSampler, RandomSampler, Sampler, grid_points
from sam3lora.tune.space.parameters import value_text
from sam3lora.tune.space.search_space import SearchSpace, adapter_mb

MAX_ATTEMPTS = 500
_SAMPLES_AT_START = 200


@dataclass(frozen=True)
class Proposal:
    """A trial that may be trained: the values of every parameter, and the base configuration with them."""

    number: int
    values: dict[str, Any]
    config: Config
    trainable_parameters: int
    is_base: bool


class Proposer:
    """Turns samples into trials. A sample that is over the budget, impossible or tried before is replaced."""

    def __init__(
        self,
        space: SearchSpace,
        *,
        taken: Iterable[TrialRecord] = (),
        rejected: Iterable[Rejection] = (),
        on_reject: Callable[[Rejection], None] = lambda rejection: None,
    ) -> None:
        """Check the base and that some sample is possible.

        Args:
            taken: Trials that exist, ended or not.
            rejected: Rejections of an earlier session, which are not reported again.
            on_reject: Receives each rejected sample, once.

        Raises:
            UserError: The base model is not found, the base configuration is impossible or over the budget, no sample
                is within it, or Optuna is asked for and not installed.
        """
        self._space, self._on_reject = space, on_reject
        self._limit = space.constraints.parameter_limit
        model = space.base.model
        meta_model(model.name, model.revision, model.local_files_only)  # raises UserError if it is not found
        taken = list(taken)
        self._sampler = build_sampler(space, [record for record in taken if record.has_ended])
        self._base_trained = any(record.is_base for record in taken)
        self._tried: set[str] = set()  # configurations
        self._seen = {_canonical(rejection.values) for rejection in rejected}  # samples
        if space.search.include_base:
            self._check_base()
        self._check_samples()
        self._tried |= {
            _fingerprint(space.base if record.is_base else space.config_of(record.values)) for record in taken
        }
        self._seen |= {_canonical(record.values) for record in taken if not record.is_base}

    def observe(self, record: TrialRecord) -> None:
        self._sampler.observe(record)

    def next(self, number: int) -> Proposal | None:
        """The next trial to train; None if nothing new is left or `MAX_ATTEMPTS` samples in a row were rejected."""
        if number == 0 and self._space.search.include_base and not self._base_trained:
            self._base_trained = True
            base = self._space.base
            self._tried.add(_fingerprint(base))
            return Proposal(number, self._space.base_values(), base, count_trainable(base), is_base=True)
        for attempt in range(MAX_ATTEMPTS):
            if self._space.size is not None and len(self._seen) >= self._space.size:
                return None
            values = self._sampler.propose(number, attempt)
            if values is None:
                return None
            is_new = _canonical(values) not in self._seen
            self._seen.add(_canonical(values))
            checked = self._check(number, values)
            if isinstance(checked, Proposal):
                self._tried.add(_fingerprint(checked.config))
                return checked
            self._sampler.reject(number)
            # A grid often holds the base, whose result stands for both: that is not worth a report.
            is_loss = checked.kind != "already tried" or self._space.search.algorithm != "grid"
            if is_loss and is_new:
                self._on_reject(checked)
        return None

    def _check(self, number: int, values: dict[str, Any]) -> Proposal | Rejection:
        try:
            config = self._space.config_of(values)
            parameters = count_trainable(config)
        except UserError as error:
            return Rejection(number, values, "impossible settings", str(error))
        if _fingerprint(config) in self._tried:
            return Rejection(number, values, "already tried", "a trial has these settings", parameters)
        if self._limit is not None and parameters > self._limit:
            reason = f"{_parameters_text(parameters)}, over the bound of {_parameters_text(self._limit)}"
            return Rejection(number, values, "over budget", reason, parameters)
        return Proposal(number, values, config, parameters, is_base=False)

    def _check_base(self) -> None:
        parameters = count_trainable(self._space.base)
        if self._limit is not None and parameters > self._limit:
            raise UserError(
                f"the base configuration {self._space.base_name} is over the budget: it has "
                f"{_parameters_text(parameters)}, allowed are {_parameters_text(self._limit)}. Raise the bound under "
                "constraints, make the base smaller under set, or leave it out with search.include_base: false"
            )

    def _check_samples(self) -> None:
        """Look for one sample that may be trained, so that a sweep without any does not start."""
        rejections: list[Rejection] = []
        for values in islice(self._some_samples(), _SAMPLES_AT_START):
            checked = self._check(0, values)
            if isinstance(checked, Proposal):
                return
            rejections.append(checked)
        over = [found.trainable_parameters for found in rejections if found.trainable_parameters is not None]
        if not over or self._limit is None:
            raise UserError(f"none of {len(rejections)} samples is possible; the first: {rejections[0].reason}")
        raise UserError(
            f"none of {len(rejections)} samples is within {_parameters_text(self._limit)}; the smallest has "
            f"{_parameters_text(min(over))}: raise the bound under constraints, or let the parameters make smaller "
            "adapters"
        )

    def _some_samples(self) -> Iterator[dict[str, Any]]:
        if self._space.search.algorithm == "grid":
            return grid_points(self._space)
        sampler = RandomSampler(self._space)
        return (sampler.propose(number, attempt=0) for number in count(1))


def propose_all(space: SearchSpace) -> tuple[list[Proposal], list[Rejection]]:
    """The trials of a sweep, and the samples that it would reject; those of Optuna as if no trial had a result.

    Raises:
        UserError: No sample can be trained.
    """
    rejections: list[Rejection] = []
    proposer = Proposer(space, on_reject=rejections.append)
    proposals: list[Proposal] = []
    while len(proposals) < space.num_trials and (found := proposer.next(len(proposals))) is not None:
        proposals.append(found)
    if not proposals:
        raise UserError(f"{space.name}: no sample can be trained: widen the parameters or the constraints")
    return proposals, rejections


def build_sampler(space: SearchSpace, ended: Sequence[TrialRecord] = ()) -> Sampler:
    """The sampler that `search.algorithm` names. Optuna, if installed (else UserError), learns from ended trials."""
    if space.search.algorithm == "optuna":
        return OptunaSampler(space, ended)
    return GridSampler(space) if space.search.algorithm == "grid" else RandomSampler(space)


def _parameters_text(parameters: int) -> str:
    """A number of trainable parameters with the size of the adapter: 1,024 trainable parameters (0.004 MB)."""
    return f"{parameters:,} trainable parameters ({value_text(adapter_mb(parameters))} MB)"


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _fingerprint(config: Config) -> str:
    """Equal for configurations that train the same adapter in the same way."""
    return config.model_dump_json(exclude={"output", "logging"})
