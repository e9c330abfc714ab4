"""Loading a SAM 3 base model for training and inference."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Sam3Config, Sam3Model
from transformers.utils import logging as transformers_logging

from sam3lora.errors import UserError
from sam3lora.model.base_folder import BaseFolder, find_base, read_processor_settings
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.quantization import quantize_nf4
from sam3lora.model.tokenization import tokenize

__all__ = ["LoadedBase", "check_resolution", "fingerprint", "load_base", "resolution_step", "tokenize"]

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_TRACKER_PREFIXES = ("tracker_model.", "tracker_neck.")


@dataclass
class LoadedBase:
    """A frozen base model in evaluation mode, with its tokenizer and the settings of its input.

    ``resolution`` is the side in pixels of the square model input. Pixels are scaled to [0, 1], then normalised as
    ``(x - image_mean) / image_std`` per channel. ``folder`` holds the files, None for a model that was made otherwise.
    """

    model: Sam3Model
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    fingerprint: str
    resolution: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    folder: BaseFolder | None = None

    @property
    def patch_size(self) -> int:
        """The side in pixels of the patches that the vision tower makes tokens of."""
        vit: Any = self.model.config.vision_config.backbone_config  # type: ignore[union-attr]
        return _side(vit.patch_size)


def load_base(
    name: str | BaseFolder = "tiny",
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    local_files_only: bool = False,
    resolution: int | None = None,
    quantization: str = "none",
) -> LoadedBase:
    """Load a base model; only safetensors is read.

    ``name`` is as for :func:`find_base`, or what that found; of a ``Sam3VideoModel`` the tracker is left out. Weights
    are float32 or bfloat16, ``attention`` is ``"sdpa"`` or ``"eager"``. ``resolution`` is the side of the model input
    in pixels, None for the model's own; see :func:`check_resolution`. ``quantization`` is ``"none"``, or ``"nf4"`` for
    linear layers in 4 bits; the fingerprint is that of the file.

    Raises:
        UserError: The model cannot be found, used or loaded whole, or an argument is out of range.
    """
    dtype = _check_dtype(dtype)
    if attention not in ("sdpa", "eager"):
        raise UserError(f"model.attention must be 'sdpa' or 'eager', got {attention!r}")
    folder = name
    if not isinstance(folder, BaseFolder):
        folder = find_base(folder, revision=revision, local_files_only=local_files_only)
    config = fitting_config(folder, resolution, quantization)
    model = _load_weights(folder, config, dtype, attention)
    model.name_or_path = model.config.name_or_path = folder.name
    processor = read_processor_settings(folder.path)
    identity = fingerprint(model)
    model.requires_grad_(False)
    if quantization == "nf4":
        quantize_nf4(model, device)
    return LoadedBase(
        model=model.eval().to(device),
        tokenizer=_load_tokenizer(folder, config),
        name=folder.name,
        revision=folder.revision,
        fingerprint=identity,
        resolution=_side(config.image_size),
        image_mean=tuple(processor.get("image_mean") or (0.5, 0.5, 0.5)),
        image_std=tuple(processor.get("image_std") or (0.5, 0.5, 0.5)),
        folder=folder,
    )


def fitting_config(folder: BaseFolder, resolution: int | None, quantization: str) -> Sam3Config:
    """The configuration to load a base model with, at a resolution of its own (None) or another; takes no time.

    Raises:
        UserError: The model is no SAM 3, is quantised already, or has no such resolution.
    """
    if quantization != "none" and "quantization_config" in folder.config:
        raise UserError(f"model.quantization is {quantization}, but {folder.name} is quantised already: set it to none")
    config = build_model_config(folder)
    if resolution is not None:
        check_resolution(config, resolution)
        config.image_size = resolution
    return config


def resolution_step(config: Sam3Config) -> int:
    """The number of pixels of which input sides are multiples: patch size times attention window."""
    vit: Any = config.vision_config.backbone_config  # type: ignore[union-attr]
    return _side(vit.patch_size) * vit.window_size


def check_resolution(config: Sam3Config, resolution: int) -> None:
    """Check that an input side splits into whole attention windows.

    The resolution is chosen at loading, because the rotary positions of the ViT's global layers are built for one grid.
    Other multiples of the patch size would run too, but with windows padded with zero tokens, which the weights have
    not seen. In ``facebook/sam3`` (steps of 336) the position embeddings, which are repeated and not interpolated,
    would also be cut in the middle of a tile.

    Raises:
        UserError: It does not; the message names the nearest valid sides.
    """
    step = resolution_step(config)
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < step or resolution % step:
        below = max(step, int(resolution) // step * step)
        raise UserError(
            f"model.resolution must be a multiple of {step} pixels (patch x attention window), got {resolution}: "
            f"the nearest are {below} and {below + step}; the model's own is {_side(config.image_size)}"
        )


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise UserError(f"model.dtype must be float32 or bfloat16, got {dtype}")
    return found


def build_model_config(folder: BaseFolder) -> Sam3Config:
    try:
        return Sam3Config.from_dict(dict(folder.config))
    except Exception as error:  # transformers raises several kinds for fields it does not accept
        raise UserError(f"{folder.path / 'config.json'} is no valid SAM 3 configuration: {error}") from error


def _load_weights(folder: BaseFolder, config: Sam3Config, dtype: torch.dtype, attention: str) -> Sam3Model:
    try:
        model: Sam3Model
        info: dict[str, Any]
        with _no_progress_bar():
            model, info = Sam3Model.from_pretrained(  # type: ignore[misc]
                folder.path,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, shape mismatches and I/O raise different kinds
        raise UserError(f"the weights in {folder.path} could not be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder.path} holds no weights for {len(missing)} parameters, first {', '.join(missing[:3])}: "
            "the checkpoint is incomplete or of another model"
        )
    unused = [key for key in sorted(info["unexpected_keys"]) if not key.startswith(_TRACKER_PREFIXES)]
    if unused:
        logger.warning("%s: %d tensors are not used, first %s", folder.name, len(unused), ", ".join(unused[:3]))
    return model


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar: weights load in a second, and the bar would disturb the caller's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load_tokenizer(folder: BaseFolder, config: Sam3Config) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder.path, config=config, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(f"the tokenizer in {folder.path} could not be loaded: {error}") from error
