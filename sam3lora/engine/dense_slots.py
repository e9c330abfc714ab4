"""Dense adapters in slots of the engine: images under several of them, and beside prompted ones, in one vision pass.

The LoRA of a dense adapter is in the bank like any other; its head and bottlenecks are kept here. A pass takes the
outputs of the layers that the heads read, and goes on to the neck for images that prompted adapters need.

Shapes: `I` images of a pass, `S` patches, `C` channels of the trunk, `N` outputs of a head, `h` `w` the size of its
logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.features import FeatureSource, SlotAdapter
from sam3lora.engine.forward import MixedForward
from sam3lora.engine.selection import NotFiniteError
from sam3lora.model.adapter.weights import AdapterWeights
from sam3lora.model.dense.bottleneck_bank import BottleneckBank
from sam3lora.model.dense.head import DenseHead
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.dense.weights import DenseWeights

DENSE_COUNTED = ("images_labelled",)


@dataclass(frozen=True)
class LabelledImage:
    """An image from `Engine.prepare_image` whose pixels the dense adapter in a slot shall label."""

    image: PreparedImage
    slot: int


@dataclass
class _Row:
    """An image in a pass under one vision adapter, or the base, and what is taken from it."""

    image: PreparedImage
    maker: SlotAdapter
    heads: dict[int, SlotAdapter] = field(default_factory=dict)  # by slot
    features: bool = False


class DenseSlots:
    """The heads and bottlenecks of dense adapters. The model thread alone calls what is here.

    Args:
        trunk: The base's vision trunk.
        forward: Runs the trunk and the neck.
        features: Has the caches, and the lock of the vision tower.
        max_images: Images that pass the trunk together.
    """

    def __init__(
        self, trunk: Any, forward: MixedForward, features: FeatureSource, *, device: torch.device, max_images: int
    ) -> None:
        self._bottlenecks = BottleneckBank(trunk)
        self._forward = forward
        self._features = features
        self._device = device
        self._max_images = max_images
        self._heads: dict[int, DenseHead] = {}
        self._settings: dict[int, DenseSettings] = {}
        self.counts: Counter[str] = Counter()

    def __contains__(self, slot: int | None) -> bool:
        return slot in self._heads

    @property
    def size_bytes(self) -> int:
        """Memory of the heads and bottlenecks on the device."""
        heads = sum(tensor.nbytes for head in self._heads.values() for tensor in head.state_dict().values())
        return heads + self._bottlenecks.size_bytes

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Keep what a dense adapter has beside LoRA; a slot of another adapter has nothing here."""
        self.clear(slot)
        if isinstance(weights, DenseWeights):
            with torch.inference_mode(False):
                self._heads[slot] = weights.head.to(self._device)
                if weights.bottlenecks is not None:
                    self._bottlenecks.put(slot, weights.bottlenecks.to(self._device))
            self._settings[slot] = weights.settings

    def clear(self, slot: int) -> None:
        self._heads.pop(slot, None)
        self._bottlenecks.clear(slot)
        self._settings.pop(slot, None)

    def answer(
        self,
        asked: Sequence[tuple[PreparedImage, SlotAdapter]],
        beside: Sequence[tuple[PreparedImage, SlotAdapter]] = (),
    ) -> list[np.ndarray | Exception]:
        """As `run`, where a fault in one image leaves the others alone: it gives its exception.

        Raises:
            torch.OutOfMemoryError, MemoryError: Together they take too much memory.
            RuntimeError: The device failed (`is_device_error`).
        """
        try:
            return [_finite(logits_Nhw) for logits_Nhw in self.run(asked, beside)]
        except Exception as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            if len(asked) == 1 and not beside:
                return [error]
        return [found for one in asked for found in self.answer([one])]

    def run(
        self,
        asked: Sequence[tuple[PreparedImage, SlotAdapter]],
        beside: Iterable[tuple[PreparedImage, SlotAdapter]] = (),
    ) -> list[np.ndarray]:
        """The logits float32 (N, h, w) of images under dense adapters, cached.

        Images `beside` them, under adapters that find objects, share the pass where their features are not at hand,
        and leave them in the cache.
        """
        found: dict[tuple[str, str | None], np.ndarray] = {}
        images = self._features.images
        with self._features.vision_lock:
            todo = []
            for image, adapter in asked:
                images.keep_image(image)
                kept = images.logits(image.key, adapter.version)
                if kept is None:
                    todo.append((image, adapter))
                else:
                    found[image.key, adapter.version] = kept
            self._features.count(image_cache_hits=len(asked) - len(todo))
            if todo:
                wanting = [
                    (image, adapter)
                    for image, adapter in beside
                    if image.features is None and not self._features.has_features(image.key, adapter)
                ]
                for image, _ in wanting:
                    images.keep_image(image)
                rows = self._rows([*todo, *wanting])
                made = self._compute(rows)
                self._features.count(images_encoded=len(rows), image_cache_misses=len(rows))
                self.counts["images_labelled"] += len(made)
                for (key, version), logits in made.items():
                    images.keep_logits(key, version, logits)
                found |= made
        return [found[image.key, adapter.version] for image, adapter in asked]

    def is_finite(self, image: PreparedImage, adapter: SlotAdapter) -> bool:
        """Whether all outputs for an image are, which is asked without a trace in caches and counters."""
        return all(np.isfinite(logits).all() for logits in self._compute(self._rows([(image, adapter)])).values())

    def _rows(self, wanted: Iterable[tuple[PreparedImage, SlotAdapter]]) -> list[_Row]:
        rows: dict[tuple[str, str | None], _Row] = {}
        for image, adapter in wanted:
            maker = adapter.of("vision_encoder")
            row = rows.setdefault((image.key, maker.version), _Row(image, maker))
            if adapter.slot is not None and adapter.slot in self:
                row.heads[adapter.slot] = adapter
            else:
                row.features = True
        return list(rows.values())

    def _compute(self, rows: Sequence[_Row]) -> dict[tuple[str, str | None], np.ndarray]:
        """The logits (N, h, w) by the image's key and the adapter's version."""
        found: dict[tuple[str, str | None], np.ndarray] = {}
        for start in range(0, len(rows), self._max_images):
            found |= self._pass(rows[start : start + self._max_images])
        return found

    def _pass(self, rows: Sequence[_Row]) -> dict[tuple[str, str | None], np.ndarray]:
        pixel_values_ICHW = self._features.pixel_values([row.image for row in rows])
        slots_I = [row.maker.slot for row in rows]
        with_features = [index for index, row in enumerate(rows) if row.features]
        layers = {number for row in rows for slot in row.heads for number in self._settings[slot].layers}
        with self._bottlenecks.rows(slots_I):
            tokens, features = self._forward.encode_layers(pixel_values_ICHW, slots_I, layers, with_features)
        for index, of_image in zip(with_features, features, strict=True):
            self._features.images.keep_features(rows[index].image.key, rows[index].maker.version, of_image)
        return self._run_heads(rows, tokens)

    def _run_heads(
        self, rows: Sequence[_Row], tokens: Mapping[int, Tensor]
    ) -> dict[tuple[str, str | None], np.ndarray]:
        """Each head on the images that it is asked for; `tokens` (I, S, C) by layer."""
        found: dict[tuple[str, str | None], np.ndarray] = {}
        of_slot: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            for slot in row.heads:
                of_slot.setdefault(slot, []).append(index)
        for slot, chosen in of_slot.items():
            (logits_INhw,) = self._heads[slot]([tokens[number][chosen] for number in self._settings[slot].layers])
            for index, logits_Nhw in zip(chosen, logits_INhw.float().cpu().numpy(), strict=True):
                row = rows[index]
                found[row.image.key, row.heads[slot].version] = logits_Nhw.copy()  # of its own memory, to be cached
        return found


def _finite(logits_Nhw: np.ndarray) -> np.ndarray | NotFiniteError:
    if np.isfinite(logits_Nhw).all():
        return logits_Nhw
    return NotFiniteError("the outputs for this image are NaN or infinite")
