"""Box conversions and overlaps, element-wise with broadcasting.

Boxes are float tensors with four last-axis entries. `cxcywh` is centre and size, `xyxy` is two corners; both in the
same unit (here: normalised to the model input). Pairwise tables are the element-wise functions on `a[:, None]` and
`b[None]`.
No epsilon is added to a denominator, so two boxes without area give NaN: drop empty targets before training.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners, (..., 4) to (..., 4), not clipped.

    >>> cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.2, 0.4])).tolist() == torch.tensor([0.4, 0.3, 0.6, 0.7]).tolist()
    True
    """
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([torch.add(centre, size, alpha=-0.5), torch.add(centre, size, alpha=0.5)], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Area of (..., 4) boxes, (...)."""
    low, high = boxes_xyxy.split(2, dim=-1)
    return _product(high - low)


def box_iou_and_union(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union in [0, 1], and the area of the union, of boxes that broadcast against each other."""
    a_low, a_high = a_xyxy.split(2, dim=-1)
    b_low, b_high = b_xyxy.split(2, dim=-1)
    intersection = _product((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    union = _product(a_high - a_low) + _product(b_high - b_low) - intersection
    return intersection / union, union


def _product(sizes: Tensor) -> Tensor:
    width, height = sizes.unbind(-1)
    return width * height


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union, in [0, 1]; NaN when neither box has an area.

    >>> box_iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 2.0, 1.0])).item()
    0.5
    """
    return box_iou_and_union(a_xyxy, b_xyxy)[0]


def box_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU, in (-1, 1]: IoU minus the share of the enclosing box that the union leaves empty.

    Source: Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630.

    >>> box_giou(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, 4.0, 1.0])).item()
    -0.5
    """
    return box_iou_and_giou(a_xyxy, b_xyxy)[1]


def box_iou_and_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """`box_iou` and `box_giou` of the same boxes."""
    iou, union = box_iou_and_union(a_xyxy, b_xyxy)
    a_low, a_high = a_xyxy.split(2, dim=-1)
    b_low, b_high = b_xyxy.split(2, dim=-1)
    enclosing = _product(torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low))
    return iou, iou - (enclosing - union) / enclosing
