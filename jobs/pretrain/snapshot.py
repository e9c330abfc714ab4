"""Snapshots of a training stage, from which an interrupted run continues."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sam3lora.files import whole_file


class Snapshot:
    """Weights, temporary heads and optimizer of a stage in one safetensors file."""

    def __init__(self, file: Path, modules: dict[str, nn.Module]) -> None:
        self._file, self._modules = file, modules

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
        for prefix, module in self._modules.items():
            tensors |= {f"{prefix}/{name}": tensor.contiguous() for name, tensor in module.state_dict().items()}
        for place, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{place}/{name}": torch.as_tensor(value) for name, value in values.items()}
        with whole_file(self._file) as scratch:
            save_file(tensors, scratch)

    def load(self, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Restore what there is; return the number of steps done."""
        if not self._file.exists():
            return 0
        tensors = load_file(self._file)
        for prefix, module in self._modules.items():
            length = len(prefix) + 1
            module.load_state_dict({n[length:]: t for n, t in tensors.items() if n.startswith(f"{prefix}/")})
        if optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimizer/"):
                    _, place, key = name.split("/")
                    state.setdefault(int(place), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(tensors["step"])
