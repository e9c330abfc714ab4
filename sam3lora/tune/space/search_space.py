"""A search space: parameters around a base configuration, with bounds and settings of the search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from sam3lora.config import COMPONENTS, Config
from sam3lora.config._section import Section
from sam3lora.config.keys import RawConfig
from sam3lora.config.loading import describe_validation
from sam3lora.config.metrics import BestMetric, is_lower_better
from sam3lora.config.yaml_text import dump_yaml
from sam3lora.errors import UserError
from sam3lora.tune.space.component_sets import COMPONENTS_KEY, components_of, name_of
from sam3lora.tune.space.keys import is_under, number_type, value_at
from sam3lora.tune.space.parameters import Choice, FreeParameter, Parameter, Tied, value_text

MOST_TRIALS = 10_000  # of a sweep; also the most combinations that the algorithm grid goes through
DEFAULT_NUM_TRIALS = 12
_BYTES_A_PARAMETER = 4  # adapters are saved in float32


def adapter_mb(trainable_parameters: int) -> float:
    """Size of an adapter's weights in MB (10^6 bytes)."""
    return trainable_parameters * _BYTES_A_PARAMETER / 1e6


class Constraints(Section):
    """Bounds of an adapter; larger samples are never trained."""

    max_trainable_parameters: int | None = Field(default=None, ge=1, description="Of the adapter.")
    max_adapter_mb: float | None = Field(default=None, gt=0, le=1e9, description="The same in MB (10^6 bytes).")

    @property
    def parameter_limit(self) -> int | None:
        """Most trainable parameters that both bounds allow."""
        by_size = None if self.max_adapter_mb is None else int(self.max_adapter_mb * 1e6 / _BYTES_A_PARAMETER)
        bounds = [bound for bound in (self.max_trainable_parameters, by_size) if bound is not None]
        return min(bounds, default=None)


class Search(Section):
    """How samples are chosen and compared."""

    algorithm: Literal["random", "grid", "optuna"] = Field(
        default="random", description='"grid" = every combination; "optuna" = learn from the trials before (TPE).'
    )
    num_trials: int | None = Field(default=None, ge=1, le=MOST_TRIALS, description="None = 12, or the whole grid.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the samples.")
    metric: BestMetric = Field(
        default="map",
        description="What makes a trial the best; of task dense mean_iou by default, of task clicks mean_iou_3.",
    )
    every_epochs: int = Field(default=1, ge=1, description="Measure the metrics every so many epochs.")
    objective: Literal["quality", "quality_and_size"] = Field(
        default="quality", description='"quality_and_size" = few trainable parameters count too (optuna).'
    )
    include_base: bool = Field(default=True, description="Trial 0 is the base configuration, unchanged.")
    max_concurrent: int | None = Field(default=None, ge=1, description="Trials at a time; None = as many as fit.")
    held_out_split: str | None = Field(
        default="test", min_length=1, description="Split that base and best are measured on at the end, if it exists."
    )

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether a small or a large value of the metric is good."""
        return "min" if is_lower_better(self.metric) else "max"


class EarlyStopping(Section):
    """Which trials are stopped before their last epoch."""

    scheduler: Literal["asha", "none"] = Field(
        default="asha", description='"asha" = asynchronous successive halving; "none" = every trial trains to its end.'
    )
    grace_epochs: int | None = Field(default=None, ge=1, description="No trial ends earlier; None = from num_epochs.")
    reduction_factor: int = Field(default=3, ge=2, description="At each rung about one trial of so many goes on.")

    @field_validator("scheduler", mode="before")
    @classmethod
    def _read_scheduler(cls, value: Any) -> Any:
        return "none" if value is None or value is False else value


class Failures(Section):
    """What happens to a trial that fails."""

    retry_out_of_memory: bool = Field(
        default=True, description="Try again with half the batch and twice the gradient accumulation."
    )


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space; made by `load_space`."""

    name: str
    base: Config  # every trial changes it
    base_name: str  # a preset's name, or that of its file
    parameters: dict[str, Parameter]  # by key, in the order of the file
    component_sets: dict[str, tuple[str, ...]]  # of the file, without `component_sets.BUILT_IN`
    constraints: Constraints
    search: Search
    early_stopping: EarlyStopping
    failures: Failures

    @cached_property
    def base_raw(self) -> RawConfig:
        """The base configuration as plain data."""
        return self.base.model_dump(mode="json")

    @cached_property
    def free(self) -> dict[str, FreeParameter]:
        """The parameters that are drawn: all but the tied ones."""
        return {key: item for key, item in self.parameters.items() if not isinstance(item, Tied)}

    @cached_property
    def _tied(self) -> list[Tied]:
        """Tied parameters, each after those that it depends on."""
        tied = {key: item for key, item in self.parameters.items() if isinstance(item, Tied)}
        order = TopologicalSorter({key: item.expression.keys for key, item in tied.items()}).static_order()
        return [tied[key] for key in order if key in tied]

    @property
    def size(self) -> int | None:
        """The number of combinations; None if it is not finite."""
        counts = [item.count for item in self.free.values()]
        return None if None in counts else math.prod(count for count in counts if count is not None)

    @property
    def num_trials(self) -> int:
        """Trials in all, the base among them; not more than there are combinations."""
        asked = self.search.num_trials or (None if self.search.algorithm == "grid" else DEFAULT_NUM_TRIALS)
        size = self.size
        if size is not None and self.search.include_base and not self._base_is_a_combination():
            size += 1
        return min(number for number in (asked, size) if number is not None)

    def _base_is_a_combination(self) -> bool:
        values = self.base_values()
        return all(item.has(values[key]) for key, item in self.free.items()) and self.complete(values) == values

    def complete(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values with the tied ones computed, in the order of the parameters; missing values are those of the base.

        Raises:
            UserError: An expression cannot be computed with these values.
        """
        known = dict(values)
        for item in self._tied:
            inputs = {key: known[key] if key in known else value_at(self.base_raw, key) for key in item.expression.keys}
            try:
                result = item.expression.evaluate(inputs)
            except ValueError as error:
                raise UserError(f"{item.key}: {error}") from None
            known[item.key] = round(result) if number_type(item.key) is int else float(result)
        return {key: known[key] for key in self.parameters if key in known}

    def components_of(self, name: str) -> tuple[str, ...]:
        """The components that a value of the parameter `components` stands for."""
        return components_of(name, self.component_sets)

    def config_of(self, values: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Config:
        """The base configuration with these values, tied ones included (see `complete`), and more keys changed.

        Raises:
            UserError: The configuration refuses the combination.
        """
        changes: dict[str, Any] = {}
        for key, value in values.items():
            if key == COMPONENTS_KEY:
                chosen = self.components_of(value)
                changes |= {f"lora.apply_to_{component}": component in chosen for component in COMPONENTS}
            elif value != value_at(self.base_raw, key):
                changes[key] = value
        if changes.get("dense.adapter", "lora") != "lora":  # the section would have no effect, which is refused
            changes = {"lora": {}} | changes
        try:
            return self.base.changed(changes | dict(more or {}))
        except ValidationError as error:
            raise UserError("; ".join(describe_validation(error))) from None

    def trial_config(self, values: Mapping[str, Any], output_dir: str) -> Config:
        """`config_of`, with what every trial gets: a folder, the metric that chooses best/, no plots and progress."""
        common = {
            "output.output_dir": output_dir,
            **self.best_adapter_keys(),
            "evaluation.base_loss": False,
            "training.frame_cache": True,
            "training.eval_steps": None,
            "training.save_steps": None,
            "training.save_total_limit": 1,
            "logging.progress": "off",
            "logging.plots": False,
        }
        return self.config_of(values, common)

    def best_adapter_keys(self) -> dict[str, Any]:
        """The keys of a configuration by which a run chooses its best/, as this sweep has them."""
        every = 0 if self.search.metric == "valid_loss" else self.search.every_epochs
        return {"evaluation.every_epochs": every, "evaluation.best_metric": self.search.metric}

    def label(self, key: str, value: Any) -> str:
        """A short text for a parameter's value: its label in the file, or such as 2e-4."""
        return self.parameters[key].label(value) if key in self.parameters else value_text(value)

    def base_values(self) -> dict[str, Any]:
        """The base configuration's own values of the parameters; components by the name of a set."""
        values = {}
        for key, item in self.parameters.items():
            if key == COMPONENTS_KEY:
                names = item.values if isinstance(item, Choice) else ()
                values[key] = name_of(self.base.lora.components, self.component_sets, names)
            else:
                values[key] = value_at(self.base_raw, key)
        return values

    def to_dict(self) -> dict[str, Any]:
        """The content of a search space file that needs no other file: the base is written whole."""
        return {
            "name": self.name,
            "base_name": self.base_name,
            "base": self.base_raw,
            "parameters": {key: item.written() for key, item in self.parameters.items()},
            "component_sets": {name: list(components) for name, components in self.component_sets.items()},
            "constraints": self.constraints.model_dump(),
            "search": self.search.model_dump(),
            "early_stopping": self.early_stopping.model_dump(),
            "failures": self.failures.model_dump(),
        }

    def to_yaml(self) -> str:
        """`load_space` of a file with this text gives an equal space."""
        return dump_yaml(self.to_dict())

    def differences(self, other: SearchSpace) -> list[str]:
        """Differences that make trials of the two spaces incomparable, a line each.

        Settings that change no result may differ: the number of trials, how many run at a time and where, names, output
        folders, caches. The number of workers of a trial may not, as it decides how many images make a step.
        """
        mine, others = _leaves(self.to_dict()), _leaves(other.to_dict())
        return [
            f"{key}: {_shown(mine, key)} here, {_shown(others, key)} there"
            for key in dict.fromkeys([*mine, *others])
            if mine.get(key) != others.get(key) and not any(is_under(key, above) for above in _MAY_DIFFER)
        ]


_WHERE = ("address", "resources_per_worker", "placement_strategy", "worker_start_timeout_s", "max_failures", "use_gpu")
_COST = (
    "cache_dir",
    "cache_gb",
    "cache_memory_gb",
    "frame_cache",
    "feature_cache",
    "num_workers",
    "gradient_checkpointing",
)
_BOOKKEEPING = ("logging_steps", "eval_steps", "save_steps", "save_minutes", "save_total_limit")
_MAY_DIFFER = (
    *("name", "base_name", "search.num_trials", "search.max_concurrent", "base.output", "base.logging"),
    *("base.evaluation.every_epochs", "base.evaluation.best_metric", "base.evaluation.base_loss"),  # see trial_config
    *(f"base.scaling.{key}" for key in _WHERE),
    *(f"base.training.{key}" for key in (*_COST, *_BOOKKEEPING)),
)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item and prefix != "parameters.":
            leaves |= _leaves(item, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = item
    return leaves


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return value_text(leaves[key]) if key in leaves else "not set"
