"""The size of cached vision features of a sweep's trials, computed from the shape of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sam3lora.config import Config
from sam3lora.model.staged.trunk import unchanged_layers
from sam3lora.training.features.codec import FeatureForm
from sam3lora.training.features.trunk_cache import kept_type, why_trunk_changes
from sam3lora.tune.estimate.parameter_budget import adapted_modules, meta_model


def why_not_kept(config: Config) -> str | None:
    """Why every epoch computes the vision features anew; None if they are kept."""
    if config.training.feature_cache is False:
        return "training.feature_cache is false"
    reason = why_trunk_changes(config, adapted_modules(config), _trunk_config(config))
    if reason is not None:
        return reason.partition(" (")[0]
    if config.data.augmentation != "none" or config.data.horizontal_flip:
        return "the training images are augmented"
    return None


def feature_bytes(configs: Iterable[Config]) -> int:
    """Bytes per image of the features of trials that keep them; trials that share features count once."""
    sizes: dict[tuple[Any, ...], int] = {}
    for config in configs:
        model, bf16 = config.model, config.training.mixed_precision == "bf16"
        trunk = _trunk_config(config)
        tokens = ((model.resolution or _side(trunk.image_size)) // _side(trunk.patch_size)) ** 2
        adapted, weights = adapted_modules(config), getattr(torch, model.dtype)
        num_layers = unchanged_layers(adapted, trunk.num_hidden_layers)
        if num_layers == trunk.num_hidden_layers:
            kind = kept_type(adapted, bf16=bf16, weights=weights)
        else:
            kind = torch.float32 if bf16 else weights
        form = FeatureForm((tokens, trunk.hidden_size), kind, config.training.feature_cache_type == "int8")
        shared = (model.name, model.revision, model.resolution, model.dtype, model.attention, bf16, num_layers, form)
        sizes[shared] = form.num_bytes
    return sum(sizes.values())


def _trunk_config(config: Config) -> Any:
    vision: Any = meta_model(config.model.name, config.model.revision, config.model.local_files_only).vision_encoder
    return vision.backbone.config


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])
