"""Where a run stands, what it was made with, and whether it may go on with other settings or data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic_core import to_jsonable_python

from sam3lora.config import Config
from sam3lora.errors import UserError

# Settings that decide what a step computes, or what the best loss is made of: a resumed run keeps them. How long to
# train, in which batches and at which rate may change.
FIXED_SETTINGS = (
    "task",
    "model",
    "lora",
    "dense",
    "clicks",
    "data",
    "training.loss",
    "training.one_to_many",
    "training.num_negatives",
    "training.seed",
)
# Settings of this section that decide when metrics are measured and which one counts, not their values.
_NOT_OF_METRICS = ("every_epochs", "best_metric", "base_loss")
# The only one that the validation loss depends on.
_OF_VALID_LOSS = "evaluation.num_samples"
# Where the base comes from; what it is, its fingerprint says.
_SOURCE_OF_BASE = ("model.name", "model.revision", "model.local_files_only")
# The adapter was made for these: with others it is not the same model.
_OF_THE_WEIGHTS = ("base model", "model.", "lora.")
_HOW_TO_COMPUTE = ("model.attention", "model.dtype")
LOSSES = ("valid_loss", "train_loss")  # measurements that are no metrics


@dataclass
class RunState:
    """Position of a run. ``step`` counts finished optimizer steps, ``step_in_epoch`` those of ``epoch``."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    step: NonNegativeInt = 0
    epoch: NonNegativeInt = 0
    step_in_epoch: NonNegativeInt = 0
    best_loss: float | None = None
    best_metric_value: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    epoch_sums: dict[str, float] = field(default_factory=dict)
    epoch_counts: Annotated[list[float], Field(min_length=3, max_length=5)] = field(
        default_factory=lambda: [0.0] * 5  # 3 or 4 in checkpoints of earlier versions
    )
    finished: bool = False  # stopped early
    images_per_step: PositiveInt = 1
    warmup_steps: int | None = None  # as planned at the start; None in checkpoints of earlier versions
    best_values: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = field(
        default_factory=dict
    )  # measurement -> [best value, its step]
    best_metric: str | None = None  # the measurement that decided so far
    base_values: dict[str, float] = field(default_factory=dict)  # what was measured of the base before the first step

    def begin_anew(self) -> None:
        """Train on with other data or another loss, from the start of the epoch: earlier results do not compare."""
        kept = {name: getattr(self, name) for name in ("step", "epoch", "images_per_step", "warmup_steps")}
        self.__dict__.update(asdict(RunState(**kept)))

    def judge_by(self, metric: str) -> None:
        """Let this measurement decide what is best: earlier values of another one do not compare."""
        if self.best_metric not in (None, metric):
            self._forget_the_best()
        self.best_metric = metric

    def measure_anew(self, kept: Sequence[str]) -> None:
        """Forget all measurements but these: later ones, measured with other settings, do not compare."""
        for values in (self.best_values, self.base_values):
            for name in values.keys() - set(kept):
                del values[name]
        if self.best_metric not in kept:
            self._forget_the_best()

    def _forget_the_best(self) -> None:
        self.best_loss = self.best_metric_value = self.best_step = None
        self.evaluations_without_improvement = 0

    def stays_stopped(self, patience: int | None) -> bool:
        """Whether a run that stopped early would have stopped with this patience as well."""
        return self.finished and patience is not None and self.evaluations_without_improvement >= patience


@dataclass
class SavedRun:
    """What a checkpoint says of its run.

    ``data`` is `RunData.digest` and ``base`` the fingerprint of the base model; None in checkpoints that are older.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    settings: dict[str, Any]
    state: RunState
    data: dict[str, str] | None = None
    base: str | None = None

    def changes(self, settings: dict[str, Any], data: dict[str, str], base: str | None = None) -> list[str]:
        """How these settings and data differ from those of the run, where that matters; each change in words.

        Args:
            base: Fingerprint of the base model; None where no model is loaded, then it is not compared. A checkpoint
                without one compares the name and revision of the base.
        """
        was, now = (_fixed_values(values) for values in (self.settings, settings))
        if self.data is not None:
            was, now = was | self.data, now | data
        if self.base is not None:
            was, now = ({name: of[name] for name in of if name not in _SOURCE_OF_BASE} for of in (was, now))
            if base is not None:
                was["base model"], now["base model"] = (f"fingerprint {of[:12]}" for of in (self.base, base))
        return _differences(was, now)

    def changes_of_measuring(self, settings: dict[str, Any], *, with_metrics: bool = True) -> list[str]:
        """How metrics and validation loss would be measured otherwise than in the run, which may go on all the same.

        `with_metrics` says whether metrics are measured at all.
        """
        was, now = (_settings_of_metrics(values) for values in (self.settings, settings))
        if not with_metrics:
            was, now = ({_OF_VALID_LOSS: of[_OF_VALID_LOSS]} for of in (was, now))
        return _differences(was, now)

    def state_with(self, settings: dict[str, Any]) -> RunState:
        """The state from which a run with these settings goes on: without measurements that do not compare."""
        state = copy.deepcopy(self.state)
        if self.changes_of_measuring(settings):
            of_loss = self.changes_of_measuring(settings, with_metrics=False)
            state.measure_anew(kept=("train_loss",) if of_loss else LOSSES)
        return state

    def why_no_step_left(self, config: Config, *, anew: bool) -> str | None:
        """Why the run would not take a step with this configuration, and what to set; None if it would.

        Args:
            anew: It goes on with changes, `RunState.begin_anew`.
        """
        state, training, reasons = self.state_with(config.model_dump(mode="json")), config.training, []
        if state.epoch >= training.num_epochs:
            reasons.append(f"{state.epoch} epochs are done: set training.num_epochs (now {training.num_epochs}) higher")
        if training.max_steps and state.step >= training.max_steps:
            reasons.append(f"{state.step} steps are done: set training.max_steps (now {training.max_steps}) higher")
        same_metric = (self.settings.get("evaluation") or {}).get("best_metric") == config.evaluation.best_metric
        if not anew and same_metric and state.stays_stopped(training.early_stopping_patience):
            reasons.append(
                f"it stopped early after {state.evaluations_without_improvement} validations without a better one: set "
                f"training.early_stopping_patience (now {training.early_stopping_patience}) higher"
            )
        return "; ".join(reasons) or None


def refuse_changes(folder: Path, changes: list[str], *, accepted: bool = False) -> None:
    """Refuse to go on from a checkpoint with these changes. Those of what the adapter belongs to cannot be accepted.

    Raises:
        UserError: naming the settings and data, and both values.
    """
    of_weights = [
        change for change in changes if change.startswith(_OF_THE_WEIGHTS) and not change.startswith(_HOW_TO_COMPUTE)
    ]
    refused = of_weights if accepted else changes
    if not refused:
        return
    advice = "Put back what has changed, or start a new run with another --output-dir"
    if not of_weights:
        advice += "; --resume-anyway goes on all the same, from the start of the epoch"
    raise UserError(f"cannot resume {folder.parent.parent}, which was made otherwise: {', '.join(refused)}. {advice}")


def _fixed_values(settings: dict[str, Any]) -> dict[str, Any]:
    """`FIXED_SETTINGS` by their full names; a setting that is newer than the run has its default."""
    return {
        name: value
        for name, value in flat_settings(Config, settings).items()
        if any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED_SETTINGS)
    }


def _settings_of_metrics(settings: dict[str, Any]) -> dict[str, Any]:
    whole = {"evaluation": settings.get("evaluation") or {}}
    return {
        name: value
        for name, value in flat_settings(Config, whole).items()
        if name.startswith("evaluation.") and name.removeprefix("evaluation.") not in _NOT_OF_METRICS
    }


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return [f"{name} (was {_show(was.get(name))}, is {_show(now.get(name))})" for name in names]


def flat_settings(section: type[BaseModel], values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field_ in section.model_fields.items():
        kind: Any = field_.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not isinstance(values.get(name) or {}, dict):
                raise ValueError(f"settings.{prefix}{name} is not a section")
            found |= flat_settings(kind, values.get(name) or {}, f"{prefix}{name}.")
        else:
            default = None if field_.is_required() else field_.get_default(call_default_factory=True)
            found[prefix + name] = values.get(name, to_jsonable_python(default))
    return found | {prefix + name: values[name] for name in values.keys() - section.model_fields.keys()}


def _show(value: Any) -> str:
    """A setting, or what is known of the data."""
    return str(value) if isinstance(value, str) and ("digest" in value or "fingerprint" in value) else repr(value)
