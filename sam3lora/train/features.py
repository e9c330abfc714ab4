"""Images to feature maps. A vision tower that nothing changes sees each image once; what it gave is kept on disk.

Kept is the output of the ViT trunk, before the neck: 72 x 72 x 1024 values of an image at 1008 pixels, a fifth of the
neck's feature maps, and it serves an adapted neck as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3lora.config import Config
from sam3lora.data.array_store import ArrayStore, digest
from sam3lora.data.collate import Batch, to_pixel_values
from sam3lora.data.sample import DecodeSettings, feature_key, read_frame
from sam3lora.errors import UserError
from sam3lora.model.components import adapted_modules
from sam3lora.model.forward import StagedSam3, VisionFeatures
from sam3lora.train.datasets import RunData

logger = logging.getLogger(__name__)

_TRUNK, _NECK = "vision_encoder.backbone.", "vision_encoder.neck."
_VERSION = 1  # of normalisation and of what is kept: another number where the same image gives other values


@dataclass
class ImageEncoder:
    """Feature maps of a run's images, and what they took.

    Args:
        staged: The model.
        device: Its device.
        trainable: Whether the vision encoder carries an adapter; without one no graph is kept.
        settings: How single images are read, without augmentation.
        trunk: The kept outputs of the trunk, or None.
        vision_passes: Images that went through the trunk.
        features_loaded: Images that did not have to.
    """

    staged: StagedSam3
    device: torch.device
    trainable: bool
    settings: DecodeSettings
    trunk: TrunkCache | None = None
    vision_passes: int = 0
    features_loaded: int = 0

    def of_batch(self, batch: Batch) -> VisionFeatures:
        """Features of a batch's images; which of them are kept, the batch says."""
        if self.trunk is None or not any(batch.feature_keys_I):
            return self._encode(batch.pixel_values(self.device, self._dtype))
        row_of = {image: row for row, image in enumerate(batch.image_rows_N.tolist())}

        def frame(image: int) -> np.ndarray:
            if image in row_of:
                return batch.images_NHWC[row_of[image]].numpy()
            height, width = batch.original_sizes_hw[image].tolist()
            record = {"path": batch.paths[image], "height": height, "width": width}
            return read_frame(record, self.settings)[0]  # kept when the batch was made, gone by now

        return self._from_trunk(self.trunk, batch.feature_keys_I, frame)

    def of_records(self, records: Sequence[Mapping[str, Any]]) -> VisionFeatures:
        """Features of the images of records of an index.

        Raises:
            ImageError: An image cannot be read.
        """
        if self.trunk is None or self.settings.features is None:
            frames = np.stack([read_frame(record, self.settings)[0] for record in records])
            return self._encode(to_pixel_values(torch.from_numpy(frames), self.device, self._dtype))
        keys = [feature_key(record, self.settings) for record in records]
        return self._from_trunk(self.trunk, keys, lambda image: read_frame(records[image], self.settings)[0])

    def _encode(self, pixel_values_ICHW: Tensor) -> VisionFeatures:
        self.vision_passes += len(pixel_values_ICHW)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self.staged.encode_images(pixel_values_ICHW)

    def _from_trunk(
        self, trunk: TrunkCache, keys: Sequence[str | None], frame: Callable[[int], np.ndarray]
    ) -> VisionFeatures:
        def pixel_values(image: int) -> Tensor:
            self.vision_passes += 1
            return to_pixel_values(torch.from_numpy(np.array(frame(image)))[None], self.device, self._dtype)

        before = self.vision_passes
        tokens_ISC = trunk.fetch(keys, pixel_values)
        self.features_loaded += len(keys) - (self.vision_passes - before)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self.staged.encode_neck(tokens_ISC)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.staged.model.vision_encoder.parameters()).dtype


class TrunkCache:
    """The trunk's output of images by key, in a store.

    Images go through the trunk one by one, so that what is kept does not depend on which others they came with.

    Args:
        staged: The model; its trunk carries no adapter.
        store: Where the outputs are kept.
        device: Of the model.
        bf16: Whether the forward runs under bfloat16 autocast.
    """

    def __init__(self, staged: StagedSam3, store: ArrayStore, *, device: torch.device, bf16: bool) -> None:
        vision: Any = staged.model.vision_encoder
        trunk = vision.backbone
        self._staged, self._store, self._device = staged, store, device
        weights = vision.neck.fpn_layers[0].proj1.weight.dtype
        self._dtype = kept_type(adapted_modules(staged.model), bf16=bf16, weights=weights)
        side = trunk.config.image_size // trunk.config.patch_size
        self._shape_SC = (side * side, trunk.config.hidden_size)
        self.identity = digest(
            _weights_digest(trunk),
            trunk.config.to_json_string(use_diff=False),
            trunk.config._attn_implementation,
            str(self._dtype),
            "bf16" if bf16 else torch.get_float32_matmul_precision(),
            device.type,
            _VERSION,
        )

    @torch.no_grad()
    def fetch(self, keys: Sequence[str | None], pixel_values: Callable[[int], Tensor]) -> Tensor:
        """Tokens (I, S, C) of images, from the store as far as it has them. The others are made here and kept.

        Of several processes that miss the same image one makes it, while the others make what else they miss.

        Args:
            keys: Of the images; None for one that is not kept.
            pixel_values: Position of an image -> its (1, 3, H, W), called for those that have to be made.
        """
        found: dict[str, Tensor] = {}
        missing: dict[str, int] = {}
        for image, key in enumerate(keys):
            if key is not None and key not in found and key not in missing:
                tokens = self._load(key)
                if tokens is None:
                    missing[key] = image
                else:
                    found[key] = tokens
        with contextlib.ExitStack() as claims:
            mine = [key for key in missing if self._store.is_full or claims.enter_context(self._store.claim(key))]
            for key in mine:
                found[key] = self._load_or_make(key, missing[key], pixel_values)
        for key in missing:
            if key not in found:
                with self._store.claim(key, wait=True):
                    found[key] = self._load_or_make(key, missing[key], pixel_values)
        return torch.stack(
            [self._make(pixel_values(image)) if key is None else found[key] for image, key in enumerate(keys)]
        )

    def _load_or_make(self, key: str, image: int, pixel_values: Callable[[int], Tensor]) -> Tensor:
        tokens_SC = self._load(key)
        if tokens_SC is None:
            tokens_SC = self._make(pixel_values(image))
            kept = tokens_SC.cpu()
            self._store.put(key, (kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy())
        return tokens_SC

    def _make(self, pixel_values_1CHW: Tensor) -> Tensor:
        return self._staged.encode_trunk(pixel_values_1CHW)[0].to(self._dtype)

    def _load(self, key: str) -> Tensor | None:
        array = self._store.get(key)
        if array is None:
            return None
        tokens_SC = torch.from_numpy(array)
        if tokens_SC.dtype == torch.uint16:
            tokens_SC = tokens_SC.view(torch.bfloat16)
        if tokens_SC.dtype != self._dtype or tokens_SC.shape != self._shape_SC:
            return None
        return tokens_SC.to(self._device)


def open_cache(config: Config, staged: StagedSam3, data: RunData, device: torch.device) -> TrunkCache | None:
    """Let a run's splits use the cache as its configuration says and its adapter allows.

    ``data`` gets what its images are kept under. Returns what keeps the trunk's outputs, or None.

    Raises:
        UserError: `training.feature_cache` is true and it cannot be used.
    """
    training = config.training
    trunk_config: Any = staged.model.vision_encoder.backbone.config
    changing = what_changes_the_trunk(config, adapted_modules(staged.model), trunk_config)
    augmented = data.train_settings.is_augmented
    if training.feature_cache is True and (changing or augmented):
        reason = changing or "data.augmentation and data.horizontal_flip change the training images in every epoch"
        raise UserError(
            f"training.feature_cache is true, but {reason}. Write auto, which keeps what can be kept, or change that"
        )
    keep_features = training.feature_cache is not False and changing is None and not (augmented and data.valid is None)
    keep_frames = training.frame_cache and not (augmented and data.valid is None)
    if not keep_features and not keep_frames:
        return None
    store = _open_store(config)
    if store is None:
        return None
    trunk = None
    if keep_features:
        trunk = TrunkCache(staged, store, device=device, bf16=training.mixed_precision == "bf16")
    features = trunk.identity if trunk else None
    keep_frames = keep_frames and trunk is None

    def kept(settings: DecodeSettings) -> DecodeSettings:
        if settings.is_augmented:
            return settings
        return replace(settings, store=store, features=features, keep_frames=keep_frames)

    data.train_settings, data.valid_settings = kept(data.train_settings), kept(data.valid_settings)
    return trunk


def what_changes_the_trunk(config: Config, adapted: Iterable[str], trunk_config: Any) -> str | None:
    """Why the trunk does not give the same for an image each time; None if it does.

    Args:
        config: Of the run.
        adapted: Names of the modules that carry an adapter.
        trunk_config: The trunk's own configuration.
    """
    changed = [name for name in adapted if name.startswith(_TRUNK)]
    if changed:
        return f"the adapter changes the vision trunk ({len(changed)} modules, first {changed[0]})"
    if config.training.model_dropout and (trunk_config.hidden_dropout or trunk_config.attention_dropout):
        return "training.model_dropout is on and the vision trunk has dropout"
    return None


def kept_type(adapted: Iterable[str], *, bf16: bool, weights: torch.dtype) -> torch.dtype:
    """The type that the trunk's output is kept in.

    The neck begins with casting to the type of its weights. Under autocast its convolutions then cast to bfloat16, and
    the maximum it pools is the same before and after. Dropout of an adapter would differ.

    Args:
        adapted: Names of the modules that carry an adapter.
        bf16: Whether the forward runs under bfloat16 autocast.
        weights: Type of the neck's weights.
    """
    neck_is_frozen = not any(name.startswith(_NECK) for name in adapted)
    return torch.bfloat16 if bf16 and neck_is_frozen else weights


def cache_folder(config: Config) -> Path:
    """`training.cache_dir`, else the environment's SAM3LORA_CACHE, else ~/.cache/sam3lora."""
    named = config.training.cache_dir or os.environ.get("SAM3LORA_CACHE") or "~/.cache/sam3lora"
    return Path(named).expanduser().absolute()


def _open_store(config: Config) -> ArrayStore | None:
    folder = cache_folder(config)
    try:
        return ArrayStore(folder, int(config.training.cache_gb * 1e9))
    except OSError as error:
        problem = f"the cache folder {folder} cannot be written ({error.strerror or error})"
        if config.training.feature_cache is True:
            raise UserError(
                f"training.feature_cache is true, but {problem}: name another by training.cache_dir"
            ) from error
        logger.warning("%s: nothing is cached. Name another by training.cache_dir", problem)
        return None


def _weights_digest(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and all bytes of a module's parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()
