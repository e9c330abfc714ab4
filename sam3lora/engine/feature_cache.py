"""Caches of the engine: images, vision features and text features, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from sam3lora.model.staged.forward import VisionFeatures

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class PreparedImage:
    """An image at the size of the model's input.

    Attributes:
        key: Equal keys are equal images, for example the SHA-256 of the file.
        pixels_RR3: uint8 RGB (resolution, resolution, 3).
        size_hw: Height and width of the original in pixels, turned as its EXIF orientation says.
        features: Of the vision tower (I = 1), if the caller has them: no tower then runs, and the pixels are not read.
    """

    key: str
    pixels_RR3: np.ndarray = field(repr=False)
    size_hw: tuple[int, int]
    features: VisionFeatures | None = field(default=None, repr=False)


class LruCache(Generic[K, V]):
    """A dictionary of bounded size; any thread may use it. `capacity` limits the sum of the entries' sizes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self.evictions = 0
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used; None if it is not kept."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: K, value: V, size: int = 1) -> None:
        """Keep a value, and drop others until it fits; one larger than the capacity is not kept."""
        with self._lock:
            self._remove(key)
            if size > self.capacity:
                return
            while self.size + size > self.capacity:
                self._remove(next(iter(self._entries)))
                self.evictions += 1
            self._entries[key] = (value, size)
            self.size += size

    def remove(self, key: K) -> None:
        with self._lock:
            self._remove(key)

    def list_keys(self) -> list[K]:
        """From the least to the most recently used."""
        with self._lock:
            return list(self._entries)

    def _remove(self, key: K) -> None:
        _, size = self._entries.pop(key, (None, 0))
        self.size -= size


class ImageCache:
    """Images, their vision features and their dense logits within one limit; any thread may use it.

    The key of features is the image and the version of the adapter whose vision tower made them (None: the base), so
    features of an adapter that was replaced are never found again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._kept: LruCache[tuple, Any] = LruCache(limit_bytes)

    @property
    def size_bytes(self) -> int:
        return self._kept.size

    @property
    def evictions(self) -> int:
        return self._kept.evictions

    def image(self, key: str) -> PreparedImage | None:
        return self._kept.get(("pixels", key))

    def keep_image(self, image: PreparedImage) -> None:
        """Keep the pixels; features are kept by themselves."""
        if self.image(image.key) is None:
            if image.features is not None:
                image = replace(image, features=None)
            self._kept.put(("pixels", image.key), image, image.pixels_RR3.nbytes)

    def features(self, key: str, version: str | None) -> VisionFeatures | None:
        return self._kept.get(("features", key, version))

    def keep_features(self, key: str, version: str | None, features: VisionFeatures) -> None:
        """Keep the features of one image; the positions, which all images share, do not count."""
        self._kept.put(("features", key, version), features, sum(values.nbytes for values in features.tensors()))

    def weigh_features(self, key: str, version: str | None, features: VisionFeatures) -> None:
        """Count the bytes of features again whose tensors have changed, if they are still kept."""
        if self.features(key, version) is features:
            self.keep_features(key, version, features)

    def logits(self, key: str, version: str | None) -> np.ndarray | None:
        return self._kept.get(("logits", key, version))

    def keep_logits(self, key: str, version: str | None, logits_Nhw: np.ndarray) -> None:
        """Keep what the dense adapter of a version says of an image."""
        self._kept.put(("logits", key, version), logits_Nhw, logits_Nhw.nbytes)

    def forget(self, key: str) -> None:
        for kept in self._kept.list_keys():
            if kept[1] == key:
                self._kept.remove(kept)

    def drop_features(self) -> None:
        """Free the memory of all features and logits; images stay."""
        for key in self._kept.list_keys():
            if key[0] != "pixels":
                self._kept.remove(key)
