"""Features of images and prompts under the adapters of a batch, computed once and cached."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sam3lora.data.images import resize_image
from sam3lora.engine.clicks.features import ClickableFeatures
from sam3lora.engine.feature_cache import ImageCache, LruCache, PreparedImage
from sam3lora.engine.forward import Forward
from sam3lora.engine.transfers import write
from sam3lora.model.adapter.metadata import DETECTION
from sam3lora.model.loading import LoadedBase
from sam3lora.model.staged.forward import TextFeatures, VisionFeatures
from sam3lora.model.tokenization import tokenize

F = TypeVar("F", bound=VisionFeatures)

COUNTED = ("image_cache_hits", "image_cache_misses", "text_cache_hits", "text_cache_misses", "images_encoded")


class SlotAdapter(NamedTuple):
    """The adapter of a slot, or the base (slot None); `trunk` is the digest of what it changes in the vision trunk."""

    slot: int | None = None
    version: str | None = None
    components: frozenset[str] = frozenset()
    geometry_cls: bool = True
    task: str = DETECTION
    trunk: str | None = None

    def of(self, component: str) -> SlotAdapter:
        """Itself if it changes the component, else the base: features of unchanged components are shared."""
        return self if component in self.components else BASE


BASE = SlotAdapter()
WantedImages = Sequence[tuple[PreparedImage, SlotAdapter]]


class FeatureSource:
    """The vision tower, which `max_images` images pass together, and the text tower behind their caches."""

    def __init__(
        self,
        base: LoadedBase,
        forward: Forward,
        *,
        image_cache_bytes: int,
        max_cached_prompts: int,
        max_images: int,
    ) -> None:
        self.images = ImageCache(image_cache_bytes)
        self._base = base
        self._forward = forward
        self._max_images = max_images
        self._text: LruCache[tuple[str, str | None], TextFeatures] = LruCache(max_cached_prompts)
        self._tokens: LruCache[str, tuple[Tensor, Tensor]] = LruCache(max_cached_prompts)
        self._tokenizer_lock = threading.Lock()  # tokenizers are not safe to share between threads
        self.vision_lock = threading.RLock()
        """Whoever runs the vision tower holds it: images that two threads want are encoded once."""
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()

    @property
    def counters(self) -> dict[str, int]:
        kept = {"image_cache_bytes": self.images.size_bytes, "image_cache_evictions": self.images.evictions}
        return {name: self._counts[name] for name in COUNTED} | kept

    def reset_counters(self) -> None:
        self._counts.clear()

    def token_ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (1, 32), from any thread.

        Raises:
            PromptError: The prompt is empty or has more than 32 tokens.
        """
        found = self._tokens.get(prompt)
        if found is None:
            with self._tokenizer_lock:
                found = tokenize(self._base.tokenizer, [prompt])
            self._tokens.put(prompt, found)
        return found

    def vision(self, wanted: WantedImages) -> dict[tuple[str, str | None], VisionFeatures]:
        """Features of images by the image's key and the version of the adapter that made them; from any thread."""
        return self._vision(wanted, VisionFeatures)

    def clickable(self, wanted: WantedImages) -> dict[tuple[str, str | None], ClickableFeatures]:
        """As `vision`, once the forward keeps the trunk; features from before are made again."""
        return self._vision(wanted, ClickableFeatures)

    def _vision(self, wanted: WantedImages, kind: type[F]) -> dict[tuple[str, str | None], F]:
        found: dict[tuple[str, str | None], F] = {}
        missing: dict[tuple[str, str | None], tuple[PreparedImage, int | None]] = {}
        for image, adapter in wanted:
            maker = adapter.of("vision_encoder")
            key = (image.key, maker.version)
            if key in found or key in missing:
                continue
            if isinstance(image.features, kind):
                found[key] = image.features
            elif (features := self._kept(key, kind)) is not None:
                found[key] = features
            else:
                missing[key] = (image, maker.slot)
        if missing:
            with self.vision_lock:
                found |= self._encode_missing(missing, kind)
        return found

    def has_features(self, key: str, adapter: SlotAdapter) -> bool:
        return self.images.features(key, adapter.of("vision_encoder").version) is not None

    def _encode_missing(
        self, missing: Mapping[tuple[str, str | None], tuple[PreparedImage, int | None]], kind: type[F]
    ) -> dict[tuple[str, str | None], F]:
        # Another thread may have made some of them while this one waited for the tower.
        found = {key: kept for key in missing if (kept := self._kept(key, kind)) is not None}
        todo = [(key, of_key) for key, of_key in missing.items() if key not in found]
        self.count(image_cache_misses=len(todo))
        for start in range(0, len(todo), self._max_images):
            chunk = todo[start : start + self._max_images]
            made = self.encode([image for _, (image, _) in chunk], [slot for _, (_, slot) in chunk])
            self.count(images_encoded=len(chunk))
            for (key, _), features in zip(chunk, made, strict=True):
                assert isinstance(features, kind), f"the forward made {type(features).__name__}"
                found[key] = features
                self.images.keep_features(*key, features)
        return found

    def _kept(self, key: tuple[str, str | None], kind: type[F]) -> F | None:
        features = self.images.features(*key)
        if not isinstance(features, kind):
            return None
        self.count(image_cache_hits=1)
        return features

    def count(self, **numbers: int) -> None:
        """Add to the counters."""
        with self._counts_lock:
            self._counts.update(numbers)

    def encode(self, images: Sequence[PreparedImage], slots: Sequence[int | None]) -> list[VisionFeatures]:
        """Features of images (I = 1) under the adapters in these slots, made anew and not cached."""
        with self.vision_lock:
            return self._forward.encode_images(self.pixel_values(images), slots)

    def pixel_values(self, images: Sequence[PreparedImage]) -> Tensor:
        """The input of the vision tower (I, 3, resolution, resolution)."""
        weight = next(self._base.model.parameters())
        return to_pixel_values(
            [image.pixels_RR3 for image in images],
            self._base.resolution,
            image_mean=self._base.image_mean,
            image_std=self._base.image_std,
            device=weight.device,
            dtype=weight.dtype,
        )

    def keep_text(self, features: Mapping[str, TextFeatures]) -> None:
        """Cache text features (P = 1 each) of the base's text tower."""
        for prompt, of_prompt in features.items():
            self._text.put((prompt, None), of_prompt)

    def text(self, wanted: Sequence[tuple[str, SlotAdapter]]) -> dict[tuple[str, str | None], TextFeatures]:
        """Features of prompts (P = 1) by the prompt and the version of the adapter that made them."""
        found: dict[tuple[str, str | None], TextFeatures] = {}
        missing: dict[tuple[str, str | None], int | None] = {}
        for prompt, adapter in wanted:
            maker = adapter.of("text_encoder")
            key = (prompt, maker.version)
            if key in found or key in missing:
                continue
            if (features := self._text.get(key)) is not None:
                found[key] = features
            else:
                missing[key] = maker.slot
        self.count(text_cache_hits=len(found), text_cache_misses=len(missing))
        if missing:
            ids, masks = (torch.cat(one) for one in zip(*map(self.token_ids, [p for p, _ in missing])))
            made = self._forward.encode_text(ids, masks, list(missing.values()))
            for key, features in zip(missing, made, strict=True):
                found[key] = features
                self._text.put(key, features)
        return found


def to_pixel_values(
    images: Sequence[np.ndarray],
    resolution: int,
    *,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised images (I, 3, resolution, resolution): resized without regard to their shape, as SAM 3 does.

    Images are uint8 (H, W, 3) RGB of any sizes; mean and standard deviation are those of pixels in [0, 1].
    """
    if not images:
        return torch.zeros(0, 3, resolution, resolution, device=device, dtype=dtype)
    pixels_IHWC = torch.empty(len(images), resolution, resolution, 3, dtype=torch.uint8, device=device)
    for pixels_HWC, image in zip(pixels_IHWC, images, strict=True):
        write(pixels_HWC, np.require(resize_image(image, (resolution, resolution)), requirements="W"))
    pixels_ICHW = pixels_IHWC.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (image_mean, image_std))
    return ((pixels_ICHW - mean) / std).to(dtype)
