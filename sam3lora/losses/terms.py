"""Element-wise losses, the box, classification and presence terms, and the counts that divide them.

Shapes: `L` decoder layers, `B` find queries, `Q` object queries, `M` matched pairs, `P` points or pixels.
Everything is computed in fp32 whatever comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import box_iou, box_iou_and_giou, cxcywh_to_xyxy
from .matching import Pairs


@dataclass(frozen=True)
class Normalizer:
    """Divisors of the loss terms, from the counts of a whole optimizer step.

    The counts cover all chunks, micro-batches and workers, and are divided by the number of workers because gradients
    are averaged over workers. `scale` is the square root of all workers' queries. So the mean over workers of the
    summed chunk gradients is the gradient of one worker that sees the whole step.
    """

    num_queries: float
    num_boxes: float
    num_semantic: float
    scale: float
    num_images: float = 1.0
    num_masks: float = 1.0

    @classmethod
    def from_counts(
        cls,
        num_queries: float,
        num_boxes: float,
        num_semantic: float,
        num_images: float = 0,
        num_masks: float = 0,
        *,
        world_size: int = 1,
    ) -> Normalizer:
        """From the step's totals over all workers.

        They are queries, targets, queries with a semantic target, images, and targets with a mask.
        """
        return cls(
            num_queries=max(num_queries, 1) / world_size,
            num_boxes=max(num_boxes, 1) / world_size,
            num_semantic=(num_semantic + 1e-6) / world_size,
            scale=math.sqrt(num_queries),
            num_images=max(num_images, 1) / world_size,
            num_masks=max(num_masks, 1) / world_size,
        )


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Element-wise y softplus(-x) + (1-y) softplus(x), for targets in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def sigmoid_focal(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Element-wise focal loss [a y + (1-a)(1-y)] (1-p_t)^g BCE(x, y), with p_t = s(x) y + (1-s(x))(1-y).

    Source: Lin et al. 2017, https://arxiv.org/abs/1708.02002; soft targets are allowed, a negative alpha means no
        class weight.
    """
    logits, targets = logits.float(), targets.float()
    loss = binary_cross_entropy(logits, targets)
    if gamma != 0:
        miss = torch.addcmul(targets, logits.sigmoid(), 1 - 2 * targets)  # 1 - p_t
        loss = loss * miss**gamma
    if alpha >= 0:
        loss = loss * ((1 - alpha) + (2 * alpha - 1) * targets)
    return loss


def soft_dice(logits_MP: Tensor, targets_MP: Tensor) -> Tensor:
    """(M,) 1 - (2 sum s y + 1) / (sum s + sum y + 1) of each row, s = sigmoid(x), in [0, 1).

    Source: Milletari et al. 2016, https://arxiv.org/abs/1606.04797, with the usual smoothing by one.
    """
    probability, targets = logits_MP.float().sigmoid(), targets_MP.float()
    overlap = (probability * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + targets.sum(-1) + 1)


def box_terms(
    boxes_cxcywh_LBQ4: Tensor, target_boxes_T4: Tensor, pairs: Pairs, num_boxes: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per layer (L,), over matched pairs: sum |cxcywh - target| / num_boxes, and sum (1 - GIoU) / num_boxes.

    Also returns the IoU of each pair (M,), without gradient.
    """
    predicted_M4 = boxes_cxcywh_LBQ4.float()[pairs.layer_M, pairs.query_M, pairs.object_query_M]
    target_M4 = target_boxes_T4.float()[pairs.target_M]
    l1_M = (predicted_M4 - target_M4).abs().sum(-1)
    iou_M, giou_M = box_iou_and_giou(cxcywh_to_xyxy(predicted_M4), cxcywh_to_xyxy(target_M4))
    # Summed by a product with "is of this layer": `index_add` would sum in no fixed order on a GPU.
    layers_L1 = torch.arange(len(pairs.num_per_layer), device=pairs.layer_M.device)[:, None]
    is_of_layer_LM = pairs.layer_M == layers_L1
    bbox_L, giou_L = (torch.stack([l1_M, 1 - giou_M])[:, None] * is_of_layer_LM).sum(-1).div(num_boxes).unbind()
    return bbox_L, giou_L, iou_M.detach()


def visible_queries(target_boxes_T4: Tensor, query_index_T: Tensor, num_queries: int) -> Tensor:
    """(B,) float: 1 for a query with at least one target of positive width and height, else 0."""
    visible_T = (target_boxes_T4[:, 2:] > 0).all(dim=1).float()
    return visible_T.new_zeros(num_queries).scatter_reduce(0, query_index_T, visible_T, "amax")


def presence_term(
    presence_logits_LB: Tensor, present_B: Tensor, num_queries: float, alpha: float = 0.5, gamma: float = 0.0
) -> Tensor:
    """Per layer (L,): focal loss of the presence logit against "the query has a target", sum / num_queries.

    The defaults make it half the mean binary cross-entropy.
    """
    targets_LB = present_B.expand_as(presence_logits_LB)
    return sigmoid_focal(presence_logits_LB, targets_LB, alpha, gamma).sum(dim=1) / num_queries


def iabce_elements(
    logits_LBQ: Tensor,
    boxes_cxcywh_LBQ4: Tensor,
    target_boxes_T4: Tensor,
    pairs: Pairs,
    *,
    pos_weight: float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    iou_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """IoU-aware binary cross-entropy of every prediction, before masking and averaging.

    Matched: pos_weight BCE(x, t), t = max(p^alpha IoU^(1-alpha), 0.01) without gradient. Unmatched: p^gamma BCE(x, 0),
    gradient also through p^gamma. A prediction matched with several targets takes the t of its last pair. Returns
    (L, B, Q) losses and (L, B, Q) bool, which predictions are matched. `iou_M` is the IoU of each pair if the caller
    has it. Source: Align-DETR, https://arxiv.org/abs/2304.07527.
    """
    logits_LBQ = logits_LBQ.float()
    index = (pairs.layer_M, pairs.query_M, pairs.object_query_M)
    with torch.no_grad():
        if iou_M is None:
            predicted_M4 = boxes_cxcywh_LBQ4.float()[index]
            iou_M = box_iou(cxcywh_to_xyxy(predicted_M4), cxcywh_to_xyxy(target_boxes_T4.float()[pairs.target_M]))
        quality_M = (logits_LBQ[index].sigmoid() ** alpha * iou_M ** (1 - alpha)).clamp(min=0.01)
        # The pair with the highest number wins: on a GPU, writing quality_M to repeated indices has no defined order.
        last_pair = _last_pair_of_each_prediction(pairs, logits_LBQ.shape)
        matched = last_pair >= 0
        quality = torch.cat([quality_M, quality_M.new_zeros(1)])[last_pair]
    positive = binary_cross_entropy(logits_LBQ, quality)
    negative = logits_LBQ.sigmoid() ** gamma * F.softplus(logits_LBQ)
    return torch.where(matched, pos_weight * positive, negative), matched


def _last_pair_of_each_prediction(pairs: Pairs, shape_LBQ: torch.Size) -> Tensor:
    _, num_queries, num_object_queries = shape_LBQ
    flat_M = (pairs.layer_M * num_queries + pairs.query_M) * num_object_queries + pairs.object_query_M
    order_M = torch.arange(len(flat_M), device=flat_M.device)
    last = torch.full((shape_LBQ.numel(),), -1, device=flat_M.device)
    return last.scatter_reduce(0, flat_M, order_M, "amax").view(shape_LBQ)


def iabce_term(
    logits_LBQ: Tensor,
    boxes_cxcywh_LBQ4: Tensor,
    target_boxes_T4: Tensor,
    pairs: Pairs,
    present_B: Tensor,
    num_queries: float,
    *,
    pad_n_queries: int | None,
    pos_weight: float,
    exhaustive_B: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Classification term per layer (L,): sum of `iabce_elements` / (num_queries max(Q, pad_n_queries)).

    Only queries with a visible target (`present_B` 1) have a loss. Where `exhaustive_B` is False, an unmatched
    prediction may be an object without a label and has no loss, as with `weak_loss` in SAM 3's `IABCEMdetr`. There the
    other predictions of the batch are averaged. Here the divisor stays the same: how many others there are depends on
    the matches, which chunks and workers do not know of each other, and where few queries are exhaustive, the average
    would give positives many times their usual weight. `options` are those of `iabce_elements`. Also returns (L, B, Q)
    bool, which predictions are matched.
    """
    loss, matched = iabce_elements(
        logits_LBQ, boxes_cxcywh_LBQ4, target_boxes_T4, pairs, pos_weight=pos_weight, **options
    )
    loss = loss * present_B[:, None]
    if exhaustive_B is not None:
        loss = loss * (matched | exhaustive_B[:, None])
    num_object_queries = max(logits_LBQ.shape[2], pad_n_queries or 0)
    return loss.sum(dim=(1, 2)) / (num_queries * num_object_queries), matched
