"""Maps at the size of an image from the small logits of a dense head, one plane at a time.

All planes of a large image at once would take gigabytes: 13 of 20 megapixels are 1 GB.

Shapes: `N` outputs of the head, `h` `w` the size of the logits, `H` `W` that of the image.
"""

from __future__ import annotations

import cv2
import numpy as np

from sam3lora.model.dense.settings import Mode


def plane(logits_hw: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """float32 (H, W): logits enlarged between pixel centres, as `interpolate(align_corners=False)` does."""
    return cv2.resize(logits_hw.astype(np.float32, copy=False), size_hw[::-1], interpolation=cv2.INTER_LINEAR)


def best_labels(logits_Nhw: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W): the output with the largest enlarged logit at each pixel, of several the first."""
    best = plane(logits_Nhw[0], size_hw)
    labels_HW = np.zeros(size_hw, dtype=np.uint8)
    for number in range(1, len(logits_Nhw)):
        own = plane(logits_Nhw[number], size_hw)
        better = own > best
        labels_HW[better] = number
        np.copyto(best, own, where=better)
    return labels_HW


def label_maps(logits_Nhw: np.ndarray, size_hw: tuple[int, int], mode: Mode, threshold: float) -> np.ndarray:
    """uint8 (M, H, W): one map of all classes, or with multilabel a map of 0 and 1 for each output."""
    if mode == "multiclass":
        return best_labels(logits_Nhw, size_hw)[None]
    return np.stack([over_threshold(one, size_hw, threshold) for one in logits_Nhw]).astype(np.uint8)


def probability(logits_Nhw: np.ndarray, number: int, size_hw: tuple[int, int], mode: Mode) -> np.ndarray:
    """float32 (H, W) in [0, 1]: that of one output. Logits are enlarged, not probabilities."""
    own = plane(logits_Nhw[number], size_hw)
    if mode != "multiclass":
        return _sigmoid(own)
    others = np.zeros(size_hw, dtype=np.float32)  # 1 / sum of exp(logit - own)
    for one in logits_Nhw:
        others += np.exp(np.minimum(plane(one, size_hw) - own, 80.0))
    return 1.0 / others


def over_threshold(logits_hw: np.ndarray, size_hw: tuple[int, int], threshold: float) -> np.ndarray:
    """bool (H, W): where the probability of one output is at least `threshold`."""
    return plane(logits_hw, size_hw) >= np.log(threshold / (1 - threshold))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -80.0, 80.0)))
