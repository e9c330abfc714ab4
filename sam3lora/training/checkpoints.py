"""Checkpoints, from which a run resumes exactly where it stopped: ``checkpoints/step_00000042/``, written whole.

    adapter.safetensors    the adapter's weights          optimizer.safetensors  AdamW's moments, by parameter name
    state.json             step, epoch, best value, partial epoch sums, and the settings the run was made with

No pickle is written or read. Random numbers need no state: dropout is seeded by (seed, step, rank); order, negatives
and augmentation by (seed, epoch). So a step is the same whether or not the run was interrupted before it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.files import whole_folder

ADAPTER, OPTIMIZER, STATE = FILES = "adapter.safetensors", "optimizer.safetensors", "state.json"
# Sections that decide what a step computes: a run cannot resume with other values of them.
FIXED_SECTIONS = ("model", "lora", "data")


@dataclass
class RunState:
    """Position of a run. ``step`` counts finished optimizer steps, ``step_in_epoch`` those of ``epoch``."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_loss: float | None = None
    best_metric_value: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    epoch_sums: dict[str, float] = field(default_factory=dict)
    epoch_counts: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    finished: bool = False
    images_per_step: int = 1
    warmup_steps: int | None = None  # as planned at the start; None in checkpoints of earlier versions
    best_values: dict[str, list[float]] = field(default_factory=dict)  # measurement -> [best value, its step]


def save_checkpoint(
    root: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    settings: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``root/step_<step>`` and remove all but the newest ``keep``."""
    target = root / f"step_{state.step:08d}"
    with whole_folder(target) as scratch:
        save_file(_cpu(get_peft_model_state_dict(model, save_embedding_layers=False)), scratch / ADAPTER)
        save_file(_cpu(_moments(model, optimizer)), scratch / OPTIMIZER)
        (scratch / STATE).write_text(json.dumps({"state": asdict(state), "settings": settings}, indent=1))
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.glob("step_*") if all((path / name).is_file() for name in FILES))


def load_checkpoint(
    folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> RunState:
    """Restore adapter and optimizer in place and return the position of the run.

    Raises:
        UserError: the checkpoint is damaged, or the run had other settings for the model, the adapter or the data.
    """
    saved, state = read_state(folder)
    check_settings(folder, saved, settings)
    try:
        adapter, moments = load_file(folder / ADAPTER), load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, error) from error
    set_peft_model_state_dict(model, adapter)
    _restore_moments(model, optimizer, moments)
    return state


def check_settings(folder: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse settings with which the run cannot be resumed.

    Raises:
        UserError: naming the settings and both values.
    """
    for section in FIXED_SECTIONS:
        now = settings.get(section) or {}
        was = _defaults(section) | (saved.get(section) or {})  # a setting that is newer than the run had its default
        if was != _defaults(section) | now:
            changed = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
            names = ", ".join(f"{section}.{key} (was {was.get(key)!r}, is {now.get(key)!r})" for key in changed)
            raise UserError(
                f"cannot resume {folder.parent.parent} with other settings: {names}. Put them back, or start a new run "
                "with another --output-dir"
            )


def _defaults(section: str) -> dict[str, Any]:
    kind: Any = Config.model_fields[section].annotation
    return to_jsonable_python(
        {name: field.get_default(call_default_factory=True) for name, field in kind.model_fields.items()}
    )


def read_state(folder: Path) -> tuple[dict[str, Any], RunState]:
    """The settings of the run, and its position."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return content["settings"], RunState(**content["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"checkpoint {folder} is damaged ({error}): remove it to resume from the one before")


def _cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
