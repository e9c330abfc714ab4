"""Checkpoints, from which a run resumes exactly where it stopped: ``checkpoints/step_00000042/``, written whole.

    adapter.safetensors    the adapter's weights          optimizer.safetensors  AdamW's moments, by parameter name
    state.json             step, epoch, best value, partial epoch sums; settings, data and base the run was made with

No pickle is written or read. Random numbers need no state: dropout is seeded by (seed, step, rank); order, negatives
and augmentation by (seed, epoch). So a step is the same whether or not the run was interrupted before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sam3lora.files import discard_folder, whole_folder
from sam3lora.training.checkpoint_folders import ADAPTER, OPTIMIZER, STATE, damaged, list_checkpoints
from sam3lora.training.saved_run import RunState, SavedRun


def save_checkpoint(
    root: Path,
    learned: dict[str, torch.Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    settings: dict[str, Any],
    data: dict[str, str],
    *,
    keep: int,
    base: str | None = None,
) -> Path:
    """Write ``root/step_<step>`` and remove all but the newest ``keep``; ``learned`` is from `Task.learned`."""
    target = root / f"step_{state.step:08d}"
    with whole_folder(target) as scratch:
        save_file(_cpu(learned), scratch / ADAPTER)
        save_file(_cpu(_moments(model, optimizer)), scratch / OPTIMIZER)
        (scratch / STATE).write_text(json.dumps(asdict(SavedRun(settings, state, data, base)), indent=1))
    for old in list_checkpoints(root)[:-keep]:
        if old != target:  # a later one lies there if the run went back to an earlier one
            discard_folder(old)
    return target


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Restore the optimizer in place, and return what was learned: tensors in the shapes of ``expected``.

    Raises:
        UserError: The checkpoint is damaged, or its tensors are not those of this adapter; nothing is restored.
    """
    try:
        adapter, moments = load_file(folder / ADAPTER), load_file(folder / OPTIMIZER)
        _check_tensors(ADAPTER, adapter, expected)
        _check_tensors(OPTIMIZER, moments, _expected_moments(model, optimizer, moments))
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(folder, error) from error
    _restore_moments(model, optimizer, moments)
    return adapter


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
    model: nn.Module, optimizer: torch.optim.Optimizer, found: Mapping[str, object]
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


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
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
