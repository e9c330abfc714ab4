"""The number of trainable parameters of an adapter, computed from the shapes of the layers that it adapts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Sam3Model, Sam3VideoConfig

from sam3lora.config import Config
from sam3lora.config.lora import LoraSettings
from sam3lora.errors import UserError
from sam3lora.model.adapter.targets import select_modules
from sam3lora.model.base_folder import TINY, BaseFolder, describe_base, find_base
from sam3lora.model.clicks.adapter import add_click_lora
from sam3lora.model.clicks.loading import build_click_head
from sam3lora.model.loading import build_model_config
from sam3lora.tune.estimate.dense_size import head_parameters

SAM3 = "facebook/sam3"


def count_trainable(config: Config) -> int:
    """Trainable parameters of the adapter of a configuration, and of the head of a dense one.

    A layer of shape out x in (a convolution counts its kernel into in) gets A (rank x in) and B (out x rank); DoRA adds
    a magnitude for each of out.

    Raises:
        UserError: The base model is not found, or target modules, components and layers do not go together, see
            `select_modules`.
    """
    if config.task == "clicks":
        return _click_parameters(config.lora.settings, *_base_of(config))
    head = 0
    if config.task == "dense":
        head = head_parameters(config, trunk_of(config))
        if not config.lora.components:
            return head
    _, widths, outputs = _adapted_layers(*_selection(config))
    return head + config.lora.rank * widths + (outputs if config.lora.use_dora else 0)


def adapted_modules(config: Config) -> tuple[str, ...]:
    """Names of the layers that get LoRA; the errors are those of `count_trainable`."""
    return _adapted_layers(*_selection(config))[0] if config.lora.components else ()


def trunk_of(config: Config) -> Any:
    """The vision trunk of the base model on the meta device."""
    vision: Any = meta_model(*_base_of(config)).vision_encoder
    return vision.backbone


def _base_of(config: Config) -> tuple[str, str | None, bool]:
    return config.model.name, config.model.revision, config.model.local_files_only


def _selection(config: Config) -> tuple[Any, ...]:
    """What decides which layers get an adapter."""
    lora = config.lora
    layers = (lora.target_modules, lora.components, lora.vision_last_layers)
    return (*layers, config.model.geometry_cls, *_base_of(config))


@functools.lru_cache(maxsize=256)
def _adapted_layers(
    targets: tuple[str, ...],
    components: tuple[str, ...] | None,
    last_layers: int | None,
    geometry_cls: bool,
    *base_model: Any,
) -> tuple[tuple[str, ...], int, int]:
    """Names of the adapted layers, and two sums over them: of in + out, and of out."""
    model = meta_model(*base_model)
    modules = dict(model.named_modules())
    names = select_modules(
        model, targets, components=components, vision_last_layers=last_layers, geometry_cls=geometry_cls
    )
    shapes = [_in_and_out(modules[name]) for name in names]
    return tuple(names), sum(a + b for a, b in shapes), sum(b for _, b in shapes)


def _in_and_out(layer: nn.Module) -> tuple[int, int]:
    """Widths of A's input and B's output.

    PEFT splits the adapter of a convolution into one with the layer's kernel and groups, and a 1 x 1.
    """
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight
        return weight[0].numel(), weight.shape[0]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


@functools.lru_cache(maxsize=256)
def _click_parameters(settings: LoraSettings, *base_model: Any) -> int:
    folder = _folder_of(*base_model)
    config = build_model_config(folder)
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    with torch.device("meta"):
        model = add_click_lora(build_click_head(folder, config.vision_config, side), settings)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@functools.lru_cache(maxsize=4)
def meta_model(name: str, revision: str | None, local_files_only: bool) -> Sam3Model:
    """The base model on the meta device, where it has no weights and takes no memory."""
    config = build_model_config(_folder_of(name, revision, local_files_only))
    with torch.device("meta"):
        return Sam3Model(config)


def _folder_of(name: str, revision: str | None, local_files_only: bool) -> BaseFolder:
    """The model's configuration, read without downloading weights; that of SAM 3 itself is known offline."""
    if name == TINY or Path(name).expanduser().is_dir():
        return find_base(name)
    from huggingface_hub import errors, hf_hub_download

    try:
        file = hf_hub_download(
            name, "config.json", revision=revision, local_files_only=local_files_only or name == SAM3
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        if name == SAM3:
            known: Any = Sam3VideoConfig()
            return BaseFolder(Path(name), name, None, known.detector_config.to_dict(), known.tracker_config.to_dict())
        raise UserError(
            f"the configuration of model.name {name!r} cannot be read: {error}. Give a folder, a hub id that this "
            "account may see, or tiny"
        ) from error
    path = Path(file).parent
    return describe_base(path, name, path.name)
