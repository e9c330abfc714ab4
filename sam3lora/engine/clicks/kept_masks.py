"""Masks that are kept beside an image, so that a later click starts from the model's own logits. No torch here."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

MOST_MASKS = 64
"""Of one image."""


class KeptMasks:
    """Low-resolution logits of one image by their id, the least recently used out first."""

    def __init__(self) -> None:
        self._masks: OrderedDict[str, np.ndarray] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(mask_mm.nbytes for mask_mm in self._masks.values())

    def keep(self, mask_mm: np.ndarray) -> str:
        """Keep float16 logits (m, m); returns their id, which equal ones share.

        >>> masks = KeptMasks()
        >>> masks.keep(np.zeros((2, 2), np.float16)) == masks.keep(np.zeros((2, 2), np.float16))
        True
        """
        mask_id = "msk_" + hashlib.blake2b(mask_mm.tobytes(), digest_size=16).hexdigest()
        self._masks[mask_id] = mask_mm
        self._masks.move_to_end(mask_id)
        if len(self._masks) > MOST_MASKS:
            self._masks.popitem(last=False)
        return mask_id

    def get(self, mask_id: str) -> np.ndarray | None:
        if mask_id in self._masks:
            self._masks.move_to_end(mask_id)
        return self._masks.get(mask_id)
