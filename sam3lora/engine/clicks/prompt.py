"""`ClickPrompt`: what the click head is asked about one object, and `ClickAnswer`: what it says.

Shapes: `k` clicks, `m` side of the low-resolution masks, `M` masks of an answer (3, or 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam3lora.engine.clicks.click import BoxXyxy, Click
from sam3lora.model.clicks import MASK_LIMIT

DRAWN_LOGIT = 10.0
"""Logit of a mask that has none of its own, such as a drawn one."""


@dataclass(frozen=True, eq=False)
class ClickPrompt:
    """One call of the head for one object.

    Attributes:
        points_k2: float32, x and y in pixels of the model's square input. The prompt encoder adds the half pixel.
        labels_k: int64, 1 belongs to the object, 0 does not.
        box_xyxy: float32 (4,) in the same pixels.
        mask_mm: Logits of an earlier mask, within +-32.
        multimask: Whether to answer with three masks, for a prompt that may mean several objects.
    """

    points_k2: np.ndarray
    labels_k: np.ndarray
    box_xyxy: np.ndarray | None = None
    mask_mm: Tensor | None = field(default=None, repr=False)
    multimask: bool = False

    @classmethod
    def of(
        cls,
        clicks: Sequence[Click],
        box_xyxy: BoxXyxy | None = None,
        mask_mm: Tensor | None = None,
        *,
        size_hw: tuple[int, int],
        side: int,
    ) -> ClickPrompt:
        """From clicks and a box in pixels of an image of `size_hw`; `side` is that of the model's input."""
        scale_xy = np.array([side / size_hw[1], side / size_hw[0]])
        points_k2 = np.array([(click.x, click.y) for click in clicks], dtype=np.float64).reshape(-1, 2)
        return cls(
            (points_k2 * scale_xy).astype(np.float32),
            np.array([click.label for click in clicks], dtype=np.int64),
            None if box_xyxy is None else (np.array(box_xyxy) * np.tile(scale_xy, 2)).astype(np.float32),
            None if mask_mm is None else as_mask_prompt(mask_mm),
            multimask=is_ambiguous(len(clicks), box_xyxy is not None, mask_mm is not None),
        )

    @property
    def kind(self) -> tuple[int, bool, bool, bool]:
        """Prompts of one kind may pass the head together; padding with clicks that mean nothing changes the masks."""
        return len(self.points_k2), self.box_xyxy is not None, self.mask_mm is not None, self.multimask


def is_ambiguous(num_clicks: int, has_box: bool, has_mask: bool) -> bool:
    """Whether a prompt may mean a part or the whole: a single click alone. It is answered with three masks."""
    return num_clicks == 1 and not has_box and not has_mask


def as_mask_prompt(logits: Tensor) -> Tensor:
    """Logits of masks as the head is shown them: without gradient, within +-32."""
    return logits.detach().clamp(-MASK_LIMIT, MASK_LIMIT)


@dataclass(frozen=True, eq=False)
class ClickAnswer:
    """The masks for one object, of which one is chosen.

    Attributes:
        logits_Mmm: Masks at low resolution, before the cut at 0.
        scores: The IoU with the object that the head expects of each mask, in [0, 1].
        object_score: Probability in [0, 1] that there is an object.
        chosen: Index of the mask to show and to refine.
    """

    logits_Mmm: Tensor = field(repr=False)
    scores: tuple[float, ...]
    object_score: float
    chosen: int

    @classmethod
    def of(cls, logits_Mmm: Tensor, scores: Sequence[float], object_score: float) -> ClickAnswer:
        """With the mask of the highest score chosen, the first of equal ones."""
        assert len(logits_Mmm) == len(scores) > 0, "a score for every mask"
        return cls(logits_Mmm, tuple(scores), object_score, chosen=int(np.argmax(scores)))

    @property
    def mask_mm(self) -> Tensor:
        """Logits of the chosen mask."""
        return self.logits_Mmm[self.chosen]

    @property
    def score(self) -> float:
        """Expected IoU of the chosen mask."""
        return self.scores[self.chosen]

    def choosing(self, index: int) -> ClickAnswer:
        """The same answer with another mask chosen.

        Raises:
            IndexError: There is no such mask.
        """
        if not 0 <= index < len(self.scores):
            raise IndexError(f"expected one of {len(self.scores)} masks, counted from 0, got {index}")
        return replace(self, chosen=index)


def drawn_mask_logits(masks: np.ndarray | Tensor, side: int, largest: float = DRAWN_LOGIT) -> Tensor:
    """Logits (..., side, side) of bool masks (H, W) or (N, H, W): +-`largest`, and between where a cell holds both.

    >>> drawn_mask_logits(np.array([[True, True], [True, False], [False, False], [False, False]]), 2)
    tensor([[ 10.,   0.],
            [-10., -10.]])
    """
    if isinstance(masks, Tensor):
        shares = F.adaptive_avg_pool2d(masks.float()[None], side)[0]
    else:
        shares = torch.from_numpy(_shares(masks, side))
    return largest * (2 * shares - 1)


def _shares(masks: np.ndarray, side: int) -> np.ndarray:
    """The share of each cell that bool masks (..., H, W) cover, in any memory order and without a copy as float."""
    (y0, y1), (x0, x1) = (_cells(pixels, side) for pixels in masks.shape[-2:])
    in_rows = np.stack([masks[..., a:b, :].sum(axis=-2, dtype=np.int64) for a, b in zip(y0, y1, strict=True)], axis=-2)
    before = np.cumsum(in_rows, axis=-1)
    before = np.concatenate([np.zeros_like(before[..., :1]), before], axis=-1)
    return ((before[..., x1] - before[..., x0]) / ((y1 - y0)[:, None] * (x1 - x0))).astype(np.float32)


def _cells(pixels: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The first pixel of each cell along an axis, and the one after its last; neighbours share a pixel they divide."""
    numbers = np.arange(side)
    return numbers * pixels // side, -(-(numbers + 1) * pixels // side)
