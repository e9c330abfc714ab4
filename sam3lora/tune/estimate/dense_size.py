"""The size of a dense adapter, and what its run keeps of an image, from shapes and the names of the data's classes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3lora.config import Config
from sam3lora.data.coco import merge_names
from sam3lora.data.prompts import prompt_key
from sam3lora.data.split_files import find_split
from sam3lora.model.dense.bottleneck import Bottleneck
from sam3lora.model.dense.head import DenseHead
from sam3lora.model.dense.model import chosen_layers, constant_layers
from sam3lora.model.staged.trunk import unchanged_layers
from sam3lora.training.dense.classes import choose_classes


def head_parameters(config: Config, trunk: Any) -> int:
    """Parameters of the head, and of the bottlenecks where there are some.

    The outputs are those of the classes of the data; without data there is one.
    """
    dense, channels = config.dense, trunk.config.hidden_size
    num_layers = len(chosen_layers(dense.layers, trunk))
    with torch.device("meta"):
        head = DenseHead(channels, _num_outputs(config), width=dense.width, num_layers=num_layers, norm=dense.norm)
        parts: list[nn.Module] = [head]
        if dense.adapter == "bottleneck":
            parts += [Bottleneck(channels, dense.bottleneck_width) for _ in trunk.layers]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def num_kept_layers(config: Config, adapted: tuple[str, ...], trunk: Any) -> int:
    """Layers whose output is kept for each image; 0 where the first layer learns.

    Args:
        adapted: Names of the modules that have LoRA.
    """
    if config.dense.adapter == "bottleneck":
        return 0
    frozen = unchanged_layers(adapted, len(trunk.layers))
    return len(constant_layers(chosen_layers(config.dense.layers, trunk), frozen))


def _num_outputs(config: Config) -> int:
    data, root = config.data, config.training.data_dir
    splits = (data.train_split, data.valid_split)
    names = _categories(root, splits, data.annotation_file, data.categories) if root is not None else ()
    return len(choose_classes(config.dense, names).names) if names else 1


@functools.lru_cache(maxsize=4)
def _categories(
    root: str, splits: tuple[str, ...], annotation_file: str, chosen: tuple[str, ...] | None
) -> tuple[str, ...]:
    files = [find_split(Path(root).expanduser(), split, annotation_file) for split in splits]
    names = merge_names([file.read("skip") for file in files if file is not None])
    wanted = None if chosen is None else {prompt_key(name) for name in chosen}
    return tuple(name for name in names if wanted is None or prompt_key(name) in wanted)
