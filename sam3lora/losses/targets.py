"""The criterion's input: packed targets and the predictions of one forward.

Shapes: `B` find queries (image, prompt pairs), `Q` object queries, `L` decoder layers (the last is the final one),
`T` targets of all queries packed in order, `M` matched pairs, `K` selected queries, `H` `W` target pixels, `h` `w`
predicted ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

MaskLogits = Callable[[str, Tensor, Tensor], Tensor]
SemanticLogits = Callable[[Tensor], Tensor]


@dataclass
class Targets:
    """Targets of B queries, packed: query b owns `num_B[b]` (long) consecutive rows, in the order of the queries.

    0 targets mean that the prompt is absent from the image. Boxes are normalised to the model input. Masks are bool at
    any resolution, cover the whole model input, and may stay on another device than the predictions; None trains
    without masks. `mask_valid_T` (bool) is False where a target has a box but no mask. `exhaustive_B` (bool) is False
    where the image may show more of what is asked for than the targets; None means that no query has more.

    Raises:
        ValueError: the parts disagree in the number of targets (`num_B` is checked only on the CPU, where that
            waits for no device).
    """

    num_B: Tensor
    boxes_cxcywh_T4: Tensor
    masks_THW: Tensor | None
    mask_valid_T: Tensor
    exhaustive_B: Tensor | None = None
    _query_index_T: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_targets = self.boxes_cxcywh_T4.shape[0]
        if self.boxes_cxcywh_T4.shape != (num_targets, 4):
            raise ValueError(f"boxes_cxcywh_T4 must be (T, 4), got {tuple(self.boxes_cxcywh_T4.shape)}")
        if self.num_B.device.type == "cpu" and int(self.num_B.sum()) != num_targets:
            raise ValueError(f"num_B sums to {int(self.num_B.sum())}, but there are {num_targets} target boxes")
        if self.mask_valid_T.shape != (num_targets,):
            raise ValueError(f"mask_valid_T must be ({num_targets},), got {tuple(self.mask_valid_T.shape)}")
        if self.masks_THW is not None and (self.masks_THW.ndim != 3 or self.masks_THW.shape[0] != num_targets):
            raise ValueError(f"masks_THW must be ({num_targets}, H, W), got {tuple(self.masks_THW.shape)}")
        if self.exhaustive_B is not None and self.exhaustive_B.shape != self.num_B.shape:
            raise ValueError(
                f"exhaustive_B must be {tuple(self.num_B.shape)} as num_B is, got {tuple(self.exhaustive_B.shape)}"
            )

    def query_index(self) -> Tensor:
        """(T,) long: which query each target belongs to."""
        if self._query_index_T is None:
            queries = torch.arange(len(self.num_B), device=self.num_B.device)
            self._query_index_T = queries.repeat_interleave(self.num_B, output_size=len(self.boxes_cxcywh_T4))
        return self._query_index_T

    def has_mask_pixels(self) -> Tensor:
        """(T,) bool: the target's mask is valid and not empty."""
        if self.masks_THW is None:
            return torch.zeros_like(self.mask_valid_T)
        return self.masks_THW.flatten(1).any(dim=1).to(self.mask_valid_T.device) & self.mask_valid_T


@dataclass
class Predictions:
    """Outputs of one forward for B queries, in fp32 or lower; logits are raw and presence is not multiplied in.

    `mask_logits` maps (branch "o2o" or "o2m", b_index (M,), q_index (M,)) to (M, h, w). It is called once per branch,
    for the final layer's matched pairs with a valid mask (see `Criterion` for the case of no such pair).
    `semantic_logits` maps b_index (K,) to (K, h, w), once, for the queries that have a mask. Indices are on the CPU,
    where matching ends. Without these functions there are no such terms.
    """

    logits_LBQ: Tensor
    boxes_cxcywh_LBQ4: Tensor
    presence_logits_LB: Tensor
    logits_o2m_LBQ: Tensor | None = None
    boxes_o2m_LBQ4: Tensor | None = None
    mask_logits: MaskLogits | None = None
    semantic_logits: SemanticLogits | None = None

    def joined(self) -> tuple[Tensor, Tensor]:
        """Logits (K, B, Q) and boxes (K, B, Q, 4) in fp32 of all layers, those of the one-to-many branch as the last L.

        Raises:
            ValueError: the branches differ in shape.
        """
        logits_LBQ, boxes_LBQ4 = self.logits_LBQ, self.boxes_cxcywh_LBQ4
        if self.logits_o2m_LBQ is not None and self.boxes_o2m_LBQ4 is not None:
            if self.logits_o2m_LBQ.shape != logits_LBQ.shape:
                shapes = f"{tuple(logits_LBQ.shape)} and {tuple(self.logits_o2m_LBQ.shape)}"
                raise ValueError(f"both branches must have the same shape, got {shapes}")
            logits_LBQ = torch.cat([logits_LBQ, self.logits_o2m_LBQ])
            boxes_LBQ4 = torch.cat([boxes_LBQ4, self.boxes_o2m_LBQ4])
        return logits_LBQ.float(), boxes_LBQ4.float()
