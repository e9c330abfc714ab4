"""How many parameters an adapter would train, computed from the shapes of the layers it would sit on."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn
from transformers import Sam3Config, Sam3Model

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.model.adapter.targets import select_modules
from sam3lora.model.base_folder import TINY, BaseFolder, find_base, read_model_config
from sam3lora.model.loading import build_model_config

SAM3 = "facebook/sam3"


class ParameterCounter:
    """Counts for the base model of one configuration, whose shape is read once and whose weights never are."""

    def __init__(self, config: Config) -> None:
        """Raises UserError when the base model is not found."""
        self._model = meta_model(config.model.name, config.model.revision, config.model.local_files_only)
        self._selected = functools.cache(self._select)

    def count(self, config: Config) -> int:
        """Trainable parameters of the adapter that a configuration asks for: `apply_lora`, but nothing is changed.

        A layer of shape out x in (a convolution counts its kernel into in) gets A (rank x in) and B (out x rank);
        DoRA adds a magnitude for each of out.

        Raises:
            UserError: its target modules, components and layers do not go together, see `select_modules`.
        """
        lora = config.lora
        widths, outputs = self._selected(
            lora.target_modules, lora.components, lora.vision_last_layers, config.model.geometry_cls
        )
        return lora.rank * widths + (outputs if lora.use_dora else 0)

    def _select(
        self, targets: tuple[str, ...], components: tuple[str, ...], last_layers: int | None, geometry_cls: bool
    ) -> tuple[int, int]:
        """Sums over the selected layers: of in + out, and of out."""
        modules = dict(self._model.named_modules())
        names = select_modules(
            self._model,
            targets,
            components=components,
            vision_last_layers=last_layers,
            geometry_cls=geometry_cls,
        )
        shapes = [_in_and_out(modules[name]) for name in names]
        return sum(a + b for a, b in shapes), sum(b for _, b in shapes)


def _in_and_out(layer: nn.Module) -> tuple[int, int]:
    """Widths of A's input and B's output.

    PEFT splits the adapter of a convolution into one with the layer's kernel and groups, and a 1 x 1.
    """
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight
        return weight[0].numel(), weight.shape[0]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


@functools.lru_cache(maxsize=4)
def meta_model(name: str, revision: str | None, local_files_only: bool) -> Sam3Model:
    """The base model without weights: on the meta device it takes no memory."""
    config = _shape_of(name, revision, local_files_only)
    with torch.device("meta"):
        return Sam3Model(config)


def _shape_of(name: str, revision: str | None, local_files_only: bool) -> Sam3Config:
    """The model's configuration, for which no weights are downloaded; SAM 3's own size is known without asking."""
    if name == TINY or Path(name).expanduser().is_dir():
        return build_model_config(find_base(name))
    from huggingface_hub import errors, hf_hub_download

    try:
        file = hf_hub_download(
            name, "config.json", revision=revision, local_files_only=local_files_only or name == SAM3
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        if name == SAM3:
            return Sam3Config()
        raise UserError(
            f"the configuration of model.name {name!r} cannot be read: {error}. Give a folder, a hub id that this "
            "account may see, or tiny"
        ) from error
    path = Path(file).parent
    return build_model_config(BaseFolder(path, name, path.name, read_model_config(path, name)))
