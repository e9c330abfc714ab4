"""`ImageEncoder`: feature maps of images, from the cache where the first layers of the vision trunk are frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from sam3lora.config import Config
from sam3lora.data.array_store import ArrayStore, digest
from sam3lora.data.batch import Batch, to_pixel_values
from sam3lora.data.sample import DecodeSettings, feature_key, read_frame
from sam3lora.errors import UserError
from sam3lora.files import cache_folder
from sam3lora.model.loading import LoadedBase
from sam3lora.model.staged.forward import StagedSam3, VisionFeatures
from sam3lora.training.datasets import RunData
from sam3lora.training.features.trunk_cache import FrozenPart, TrunkCache

logger = logging.getLogger(__name__)

Features = TypeVar("Features")


@dataclass(kw_only=True)
class EncodedImages(Generic[Features]):
    """What the trunk makes of a run's images, from the cache where its first layers are frozen; counts where from.

    ``settings`` read single images without augmentation. Mean and standard deviation are per channel, of pixels in
    [0, 1]. ``vision_passes`` counts images that went through the trunk, or through its frozen part where that is
    cached; ``features_loaded`` counts those whose cached features were used instead.
    """

    device: torch.device
    settings: DecodeSettings
    image_mean: Sequence[float]
    image_std: Sequence[float]
    trunk: TrunkCache | None = None
    vision_passes: int = 0
    features_loaded: int = 0

    def of_batch(self, batch: Batch) -> Features:
        """Features of a batch's images; its keys tell which of them are cached."""
        if self.trunk is None or not any(batch.feature_keys_I):
            return self._encode(self.pixel_values(batch.images_NHWC))
        row_of = {image: row for row, image in enumerate(batch.image_rows_N.tolist())}

        def frame(image: int) -> np.ndarray:
            if image in row_of:
                return batch.images_NHWC[row_of[image]]
            height, width = batch.original_sizes_hw[image].tolist()
            record = {"path": batch.paths[image], "height": height, "width": width}
            return read_frame(record, self.settings)[0]  # cached when the batch was made, but removed since

        return self._from_trunk(self.trunk, batch.feature_keys_I, frame)

    def load_ahead(self, batch: Batch) -> None:
        """Read the cached features of a batch's images into memory for `of_batch`; another thread may call this."""
        if self.trunk is not None:
            self.trunk.load_ahead(batch.feature_keys_I, batch)

    def of_records(self, records: Sequence[Mapping[str, Any]]) -> Features:
        """Features of the images of records of an index.

        Raises:
            ImageError: An image cannot be read.
        """
        if self.trunk is None or self.settings.features is None:
            frames = np.stack([read_frame(record, self.settings)[0] for record in records])
            return self._encode(self.pixel_values(frames))
        keys = [feature_key(record, self.settings) for record in records]
        return self._from_trunk(self.trunk, keys, lambda image: read_frame(records[image], self.settings)[0])

    def pixel_values(self, frames_IHWC: np.ndarray) -> Tensor:
        """uint8 frames (I, S, S, 3) as the model's input (I, 3, S, S), normalised as the base requires."""
        return to_pixel_values(frames_IHWC, self.image_mean, self.image_std, self.device, self.pixel_type)

    @property
    def pixel_type(self) -> torch.dtype:
        """The type of the model's input."""
        raise NotImplementedError

    def whole(self, pixel_values_ICHW: Tensor) -> Features:
        """Features of images that are not cached."""
        raise NotImplementedError

    def rest(self, tokens_ISC: Tensor) -> Features:
        """Features from what the cache keeps."""
        raise NotImplementedError

    def _encode(self, pixel_values_ICHW: Tensor) -> Features:
        self.vision_passes += len(pixel_values_ICHW)
        return self.whole(pixel_values_ICHW)

    def _from_trunk(
        self, trunk: TrunkCache, keys: Sequence[str | None], frame: Callable[[int], np.ndarray]
    ) -> Features:
        def pixel_values_1CHW(image: int) -> Tensor:
            self.vision_passes += 1
            return self.pixel_values(np.array(frame(image))[None])

        before = self.vision_passes
        tokens_ISC = trunk.fetch(keys, pixel_values_1CHW)
        self.features_loaded += len(keys) - (self.vision_passes - before)
        return self.rest(tokens_ISC)


@dataclass
class ImageEncoder(EncodedImages[VisionFeatures]):
    """Computes the feature maps of a run's images.

    Unless ``trainable`` (the vision encoder carries an adapter), no graph is kept.
    """

    staged: StagedSam3
    trainable: bool

    @property
    def pixel_type(self) -> torch.dtype:
        return next(self.staged.model.vision_encoder.parameters()).dtype

    def whole(self, pixel_values_ICHW: Tensor) -> VisionFeatures:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self.staged.encode_images(pixel_values_ICHW)

    def rest(self, tokens_ISC: Tensor) -> VisionFeatures:
        assert self.trunk is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self.staged.encode_rest(tokens_ISC, self.trunk.num_layers)


def open_cache(
    config: Config,
    base: LoadedBase,
    frozen: FrozenPart,
    data: RunData,
    device: torch.device,
    *,
    bf16: bool,
    changing: str | None,
) -> TrunkCache | None:
    """Open the cache that the configuration asks for and the adapter allows, and set it in the splits of ``data``.

    Args:
        frozen: What may be kept.
        changing: Why nothing may be kept, if so; see `why_trunk_changes`.

    Raises:
        UserError: `training.feature_cache` is true and it cannot be used.
    """
    training = config.training
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
        trunk = TrunkCache(
            frozen,
            store,
            device=device,
            bf16=bf16,
            int8=training.feature_cache_type == "int8",
            compiled=training.compile and augmented,
            memory_bytes=int(training.cache_memory_gb * 1e9),
        )
    features = digest(trunk.identity, *base.image_mean, *base.image_std) if trunk else None
    keep_frames = keep_frames and trunk is None

    def kept(settings: DecodeSettings) -> DecodeSettings:
        if settings.is_augmented:
            return settings
        return replace(settings, store=store, features=features, keep_frames=keep_frames)

    data.train_settings, data.valid_settings = kept(data.train_settings), kept(data.valid_settings)
    return trunk


def _open_store(config: Config) -> ArrayStore | None:
    folder = cache_folder(config.training.cache_dir)
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
