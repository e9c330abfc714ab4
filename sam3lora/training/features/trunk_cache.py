"""`TrunkCache`: outputs of the frozen layers of the vision trunk, computed once and kept in memory and on disk.

Of a prompted model it keeps the tokens before the first layer that an adapter changes, or the output of the whole trunk
where none does: 72 x 72 x 1024 values for an image at 1008 pixels, a fifth of the neck's feature maps. An adapted neck
can use them too. Of a dense model it keeps the tokens after each frozen layer that the head reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam3lora.config import Config
from sam3lora.data.array_store import ArrayStore, digest
from sam3lora.model.components import adapted_modules
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.model.staged.trunk import TRUNK, token_type, unchanged_layers, weights_of_first_layers
from sam3lora.training.features.codec import FeatureForm
from sam3lora.training.features.memory import FeatureMemory

_NECK = "vision_encoder.neck."
_VERSION = 2  # raise it when the same image gives other values
_SECONDS_BETWEEN_TOUCHES = 60.0


@dataclass(frozen=True)
class FrozenPart:
    """The part of a ``Sam3ViTModel`` whose output for an image is the same in every epoch.

    Args:
        num_layers: How many of its first layers that takes.
        encode: Maps (1, 3, H, W) to the tokens (1, layers x S, C) that are kept.
        others: Further layers of which tokens are kept, before those of the last.
        dtype: The type to keep them in; None for the type between layers.
    """

    trunk: Any
    num_layers: int
    encode: Callable[[Tensor], Tensor]
    others: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


def frozen_part(staged: StagedSam3, *, bf16: bool) -> FrozenPart:
    """That of a prompted model, whose neck reads the trunk's output."""
    vision: Any = staged.model.vision_encoder
    adapted = adapted_modules(staged.model)
    num_layers = unchanged_layers(adapted, len(vision.backbone.layers))
    weights = vision.neck.fpn_layers[0].proj1.weight.dtype
    is_whole = num_layers == len(vision.backbone.layers)
    dtype = kept_type(adapted, bf16=bf16, weights=weights) if is_whole else None
    return FrozenPart(vision.backbone, num_layers, lambda pixels: staged.encode_trunk(pixels, num_layers), dtype=dtype)


class TrunkCache:
    """The tokens of images by key, in memory and in a store.

    Images go through the trunk one by one, so that their features do not depend on the rest of the batch. New features
    are used in the form in which they are kept, so that no number depends on what the cache held before. ``bf16`` tells
    whether the forward runs under bfloat16 autocast, ``compiled`` whether the frozen layers are compiled, which rounds
    differently.
    """

    def __init__(
        self,
        frozen: FrozenPart,
        store: ArrayStore,
        *,
        device: torch.device,
        bf16: bool,
        int8: bool = False,
        compiled: bool = False,
        memory_bytes: int = 0,
    ) -> None:
        trunk = frozen.trunk
        self._encode, self._store, self._device = frozen.encode, store, device
        self._touched_s = time.monotonic()
        self.memory = FeatureMemory(memory_bytes, pinned=device.type == "cuda")
        self.num_layers = frozen.num_layers
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            kept = frozen.dtype or token_type(trunk)
        side = trunk.config.image_size // trunk.config.patch_size
        self._form = FeatureForm(((1 + len(frozen.others)) * side * side, trunk.config.hidden_size), kept, int8)
        self.identity = digest(
            _digest(weights_of_first_layers(trunk, self.num_layers)),
            self.num_layers,
            *frozen.others,
            trunk.config.to_json_string(use_diff=False),
            trunk.config._attn_implementation,
            str(kept),
            "int8" if int8 else "exact",
            "compiled" if compiled else "eager",
            "bf16" if bf16 else torch.get_float32_matmul_precision(),
            device.type,
            _VERSION,
        )

    @torch.no_grad()
    def fetch(self, keys: Sequence[str | None], pixel_values: Callable[[int], Tensor]) -> Tensor:
        """Tokens (I, S, C) of images, from memory or the store where they are there, else computed.

        Of several processes that miss the same image, one computes it while the others compute their other images. An
        image with the key None is not cached. ``pixel_values`` maps the position of an image to its (1, 3, H, W).
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
        # First the images that no other process is computing, then those that another one may have finished by now.
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

    def load_ahead(self, keys: Iterable[str | None], user: object) -> None:
        """Read the stored tokens of images into memory for `fetch`; any thread may call this.

        Tokens beyond the memory's bound are dropped when ``user`` is collected.
        """
        self.memory.read_ahead((key for key in keys if key is not None), self._read, user)

    def _load_or_make(self, key: str, image: int, pixel_values: Callable[[int], Tensor]) -> Tensor:
        tokens_SC = self._load(key)
        if tokens_SC is None:
            kept = self._form.pack(self._tokens(pixel_values(image)))
            self._store.put(key, self._form.to_array(kept))
            self.memory.keep(key, kept)
            tokens_SC = self._form.unpack(kept, self._device)
        return tokens_SC

    def _make(self, pixel_values_1CHW: Tensor) -> Tensor:
        return self._tokens(pixel_values_1CHW).to(self._form.dtype)

    def _tokens(self, pixel_values_1CHW: Tensor) -> Tensor:
        return self._encode(pixel_values_1CHW)[0]

    def _load(self, key: str) -> Tensor | None:
        kept = self.memory.get(key)
        if kept is not None:
            self._touch_store(key)
        elif (kept := self._read(key)) is not None:
            self.memory.keep(key, kept)
        return None if kept is None else self._form.unpack(kept, self._device)

    def _read(self, key: str) -> Tensor | None:
        array = self._store.get(key)
        return None if array is None else self._form.from_array(array)

    def _touch_store(self, key: str) -> None:
        """Mark this run as active in the store now and then, so that its arrays are not evicted."""
        if time.monotonic() - self._touched_s > _SECONDS_BETWEEN_TOUCHES:
            self._touched_s = time.monotonic()
            _ = key in self._store


def why_trunk_changes(config: Config, adapted: Iterable[str], trunk_config: Any) -> str | None:
    """The reason why no layer of the trunk has constant output for an image; None if the first one has."""
    changed = [name for name in adapted if name.startswith(TRUNK)]
    if not unchanged_layers(changed, trunk_config.num_hidden_layers):
        return (
            f"the adapter changes the vision trunk ({len(changed)} modules, first {changed[0]}; with "
            "lora.vision_last_layers the output of the layers before them could be kept)"
        )
    if config.training.model_dropout and (trunk_config.hidden_dropout or trunk_config.attention_dropout):
        return "training.model_dropout is on and the vision trunk has dropout"
    return None


def kept_type(adapted: Iterable[str], *, bf16: bool, weights: torch.dtype) -> torch.dtype:
    """The type in which the output of the whole trunk is kept.

    The neck begins with casting to the type of its weights. Under autocast its convolutions then cast to bfloat16, and
    the maximum it pools is the same before and after. Dropout of an adapter would differ.
    """
    neck_is_frozen = not any(name.startswith(_NECK) for name in adapted)
    return torch.bfloat16 if bf16 and neck_is_frozen else weights


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and all bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()
