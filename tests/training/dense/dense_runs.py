"""Configurations of dense runs, and what such a run has left in its folder."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from sam3lora.config import Config

from ..run_folder import folder_of, lines_of, without_measures

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "apply_to_vision_encoder": True}
ADAPTERS = {
    "lora": {"lora": LORA},
    "bottleneck": {"lora": {}, "dense": {"adapter": "bottleneck", "mode": "binary"}},
    "none": {"lora": {}, "dense": {"adapter": "none", "mode": "multilabel"}},
}


def weights_of(run: Config, name: str = "last") -> dict[str, torch.Tensor]:
    files = sorted((folder_of(run) / name).glob("*.safetensors"))
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_weights(run: Config, other: Config, **tolerance: float) -> None:
    ours, theirs = weights_of(run), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name, **tolerance)


def logged(run: Config, kind: str) -> list[dict]:
    return [without_measures(line) for line in lines_of(run, kind)]
