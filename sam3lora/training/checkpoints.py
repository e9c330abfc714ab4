"""Checkpoints, from which a run resumes exactly where it stopped: ``checkpoints/step_00000042/``, written whole.

    adapter.safetensors    the adapter's weights          optimizer.safetensors  AdamW's moments, by parameter name
    state.json             step, epoch, best value, partial epoch sums; settings, data and base the run was made with

No pickle is written or read. Random numbers need no state: dropout is seeded by (seed, step, rank); order, negatives
and augmentation by (seed, epoch). So a step is the same whether or not the run was interrupted before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.files import discard_folder, whole_folder

ADAPTER, OPTIMIZER, STATE = FILES = "adapter.safetensors", "optimizer.safetensors", "state.json"
# Settings that decide what a step computes, or what the best loss is made of: a resumed run keeps them. How long to
# train, in which batches and at which rate may change.
FIXED_SETTINGS = (
    "model",
    "lora",
    "data",
    "training.loss",
    "training.one_to_many",
    "training.num_negatives",
    "training.seed",
)
_NAME = re.compile(r"step_[0-9]{8,}")
# Where the base comes from; what it is, its fingerprint says.
_SOURCE_OF_BASE = ("model.name", "model.revision", "model.local_files_only")
# The adapter was made for these: with others it is not the same model.
_OF_THE_WEIGHTS = ("base model", "model.", "lora.")
_HOW_TO_COMPUTE = ("model.attention", "model.dtype")


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
    epoch_counts: Annotated[list[float], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )
    finished: bool = False  # stopped early
    images_per_step: PositiveInt = 1
    warmup_steps: int | None = None  # as planned at the start; None in checkpoints of earlier versions
    best_values: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = field(
        default_factory=dict
    )  # measurement -> [best value, its step]
    best_metric: str | None = None  # the measurement that decided so far

    def begin_anew(self) -> None:
        """Train on with other data or another loss, from the start of the epoch: earlier results do not compare."""
        kept = {name: getattr(self, name) for name in ("step", "epoch", "images_per_step", "warmup_steps")}
        self.__dict__.update(asdict(RunState(**kept)))

    def judge_by(self, metric: str) -> None:
        """Let this measurement decide what is best: earlier values of another one do not compare."""
        if self.best_metric not in (None, metric):
            self.best_loss = self.best_metric_value = self.best_step = None
            self.evaluations_without_improvement = 0
        self.best_metric = metric

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
        names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        return [f"{name} (was {_show(was.get(name))}, is {_show(now.get(name))})" for name in names]

    def why_no_step_left(self, config: Config, *, anew: bool) -> str | None:
        """Why the run would not take a step with this configuration, and what to set; None if it would.

        Args:
            anew: It goes on with changes, `RunState.begin_anew`.
        """
        state, training, reasons = self.state, config.training, []
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


def save_checkpoint(
    root: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    settings: dict[str, Any],
    data: dict[str, str],
    *,
    keep: int,
    base: str | None = None,
) -> Path:
    """Write ``root/step_<step>`` and remove all but the newest ``keep``."""
    target = root / f"step_{state.step:08d}"
    with whole_folder(target) as scratch:
        save_file(_cpu(get_peft_model_state_dict(model, save_embedding_layers=False)), scratch / ADAPTER)
        save_file(_cpu(_moments(model, optimizer)), scratch / OPTIMIZER)
        (scratch / STATE).write_text(json.dumps(asdict(SavedRun(settings, state, data, base)), indent=1))
    for old in list_checkpoints(root)[:-keep]:
        if old != target:  # a later one lies there if the run went back to an earlier one
            discard_folder(old)
    return target


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first; folders of other names, such as copies, do not count."""
    if not root.is_dir():
        return []
    found = [path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def load_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore adapter and optimizer in place.

    Raises:
        UserError: The checkpoint is damaged, or its tensors are not those of this adapter; nothing is restored.
    """
    try:
        adapter, moments = load_file(folder / ADAPTER), load_file(folder / OPTIMIZER)
        _check_tensors(ADAPTER, adapter, get_peft_model_state_dict(model, save_embedding_layers=False))
        _check_tensors(OPTIMIZER, moments, _expected_moments(model, optimizer, moments))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    set_peft_model_state_dict(model, adapter)
    _restore_moments(model, optimizer, moments)


def read_state(folder: Path) -> SavedRun:
    """Position, settings and data of the run.

    Raises:
        UserError: The checkpoint is damaged.
    """
    try:
        saved = TypeAdapter(SavedRun).validate_json((folder / STATE).read_bytes())
        _flat(Config, saved.settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(folder, f"{STATE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    return saved


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
        for name, value in _flat(Config, settings).items()
        if any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED_SETTINGS)
    }


def _flat(section: type[BaseModel], values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field_ in section.model_fields.items():
        kind: Any = field_.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not isinstance(values.get(name) or {}, dict):
                raise ValueError(f"{STATE}: settings.{prefix}{name} is not a section")
            found |= _flat(kind, values.get(name) or {}, f"{prefix}{name}.")
        else:
            default = None if field_.is_required() else field_.get_default(call_default_factory=True)
            found[prefix + name] = values.get(name, to_jsonable_python(default))
    return found | {prefix + name: values[name] for name in values.keys() - section.model_fields.keys()}


def _show(value: Any) -> str:
    """A setting, or what is known of the data."""
    return str(value) if isinstance(value, str) and ("digest" in value or "fingerprint" in value) else repr(value)


def _damaged(folder: Path, error: object) -> UserError:
    return UserError(f"checkpoint {folder} is damaged ({error}): remove it to resume from the one before")


def _cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_tensors(file: str, found: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError that names a tensor which the file lacks, has too much, or has in another shape."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"{file} lacks {name}")
        if name not in expected:
            raise ValueError(f"{file} has {name}, which is not of this run")
        if found[name].shape != expected[name].shape:
            shapes = [list(tensors[name].shape) for tensors in (found, expected)]
            raise ValueError(f"{file} has {name} of shape {shapes[0]}, expected {shapes[1]}")


def _expected_moments(
    model: PeftModel, optimizer: torch.optim.Optimizer, found: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """Tensors in the shapes of AdamW's state. A parameter that never had a gradient may lack it, but not all may."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    begun = {name.rpartition("/")[0] for name in found}
    parameters = [(name, each) for name, each in model.named_parameters() if id(each) in trained]
    having = [(name, each) for name, each in parameters if name in begun] or parameters
    one = torch.zeros(())
    return {
        f"{name}/{key}": value
        for name, each in having
        for key, value in (("step", one), ("exp_avg", each), ("exp_avg_sq", each))
    }


def _moments(model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _restore_moments(model: PeftModel, optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in moments.items():
        parameter, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter, {})[key] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[int, dict[str, torch.Tensor]] = {}
    place = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[id(parameter)] in by_parameter:
                places[place] = by_parameter[names[id(parameter)]]
            place += 1
    optimizer.load_state_dict({"state": places, "param_groups": optimizer.state_dict()["param_groups"]})
