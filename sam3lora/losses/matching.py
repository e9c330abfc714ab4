"""Matching predictions with targets: Hungarian (one-to-one) and DAC-DETR's one-to-many rule.

Costs of all layers and both branches are computed on the device for each target against the object queries of its own
query (no padding), and go to the host in one transfer, where scipy solves the assignments while the device goes on.

Shapes: `L` layers, `B` queries, `Q` object queries, `T` packed targets, `M` matched pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .boxes import box_giou, box_iou, cxcywh_to_xyxy
from .targets import Predictions, Targets


@dataclass(frozen=True)
class HungarianCost:
    """Cost of a one-to-one match: class (focal) + L1 of cxcywh - GIoU, weighted; presence is not part of it.

    class = alpha (1-p)^gamma softplus(-x) - (1-alpha) p^gamma softplus(x), p = sigmoid(x).
    """

    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def __call__(self, logits_LBQ: Tensor, boxes_cxcywh_LBQ4: Tensor, targets: Targets) -> Tensor:
        """(L, T, Q) fp32 cost of every object query for every target of the same find query."""
        logits_LTQ, boxes_LTQ4, target_T14 = _of_each_target(logits_LBQ, boxes_cxcywh_LBQ4, targets)
        l1 = (boxes_LTQ4 - target_T14).abs().sum(-1)
        giou = box_giou(cxcywh_to_xyxy(boxes_LTQ4), cxcywh_to_xyxy(target_T14))
        probability = logits_LTQ.sigmoid()
        positive = self.alpha * (1 - probability) ** self.gamma * F.softplus(-logits_LTQ)
        negative = (1 - self.alpha) * probability**self.gamma * F.softplus(logits_LTQ)
        return self.cost_bbox * l1 + self.cost_class * (positive - negative) - self.cost_giou * giou


@dataclass(frozen=True)
class OneToManyRule:
    """Match the `topk` best object queries of a target whose score alpha p + (1-alpha) IoU exceeds `threshold`.

    "Best" means strictly above the (1 - topk/Q) quantile of the target's scores, so ties select fewer. A prediction
    may serve several targets; a target may stay without a match. Source: DAC-DETR (Hu et al., NeurIPS 2023).
    """

    alpha: float = 0.3
    threshold: float = 0.4
    topk: int = 4

    @torch.no_grad()
    def __call__(self, logits_BQ: Tensor, boxes_cxcywh_BQ4: Tensor, targets: Targets) -> Tensor:
        """(T, Q) fp32: 1 where matched, 0 where not, NaN where the score is not finite."""
        logits_TQ, boxes_TQ4, target_T14 = _of_each_target(logits_BQ, boxes_cxcywh_BQ4, targets, query_dim=0)
        if logits_TQ.numel() == 0:
            return torch.zeros_like(logits_TQ)
        iou = box_iou(cxcywh_to_xyxy(boxes_TQ4), cxcywh_to_xyxy(target_T14))
        score = self.alpha * logits_TQ.sigmoid() + (1 - self.alpha) * iou
        best = score > torch.quantile(score, max(0.0, 1 - self.topk / score.shape[1]), dim=1, keepdim=True)
        matched = (best & (score > self.threshold)).float()
        return matched.masked_fill(~score.isfinite(), float("nan"))


def _of_each_target(
    logits: Tensor, boxes: Tensor, targets: Targets, query_dim: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 predictions of each target's own query, and the targets' boxes (T, 1, 4) to broadcast against them."""
    query_index = targets.query_index().to(logits.device)
    target_boxes = targets.boxes_cxcywh_T4.to(logits.device)
    return (
        logits.index_select(query_dim, query_index).float(),
        boxes.index_select(query_dim, query_index).float(),
        target_boxes.float()[:, None],
    )


@dataclass(frozen=True)
class Pairs:
    """Matched pairs of one branch, ordered by layer; `target_M` indexes packed targets.

    The tensors are long and on the predictions' device. `host_M4` has the same four columns as a NumPy array, for
    decisions that should not wait for the device.
    """

    layer_M: Tensor
    query_M: Tensor
    object_query_M: Tensor
    target_M: Tensor
    num_per_layer: list[int]
    host_M4: np.ndarray

    @classmethod
    def from_rows(cls, rows_M4: np.ndarray, num_layers: int, device: torch.device | str = "cpu") -> Pairs:
        """From integer rows (layer, query, object query, packed target), sorted by layer."""
        columns = torch.from_numpy(np.ascontiguousarray(rows_M4.T, dtype=np.int64)).to(device, non_blocking=True)
        counts = np.bincount(rows_M4[:, 0], minlength=num_layers).tolist()
        return cls(columns[0], columns[1], columns[2], columns[3], counts, rows_M4)


@dataclass(frozen=True)
class Matches:
    """Matches of a batch, and facts about its targets on the host.

    `o2o` is Hungarian on all layers; `o2m` is Hungarian on the auxiliary layers and one-to-many on the final one.
    """

    o2o: Pairs
    o2m: Pairs | None
    num_targets_B: np.ndarray
    mask_valid_T: np.ndarray
    has_mask_pixels_T: np.ndarray


def match(
    predictions: Predictions,
    targets: Targets,
    hungarian: HungarianCost | None = None,
    one_to_many: OneToManyRule | None = None,
) -> Matches:
    """Match both branches of a batch with its targets: `begin_match` and `PendingMatches.finish`."""
    return begin_match(predictions, targets, hungarian, one_to_many).finish()


def begin_match(
    predictions: Predictions,
    targets: Targets,
    hungarian: HungarianCost | None = None,
    one_to_many: OneToManyRule | None = None,
) -> PendingMatches:
    """Compute the costs of both branches on the device and send them on their way to the host, waiting for nothing.

    What the device is given to do before `PendingMatches.finish` runs while the host assigns.

    Raises:
        ValueError: the branches differ in shape, or the targets are of another number of queries.
    """
    hungarian, one_to_many = hungarian or HungarianCost(), one_to_many or OneToManyRule()
    logits, boxes = predictions.logits_LBQ.detach(), predictions.boxes_cxcywh_LBQ4.detach()
    num_layers, num_queries, num_object_queries = logits.shape
    if len(targets.num_B) != num_queries:
        raise ValueError(
            f"targets.num_B must have one count for each of {num_queries} queries, got {len(targets.num_B)}"
        )
    tables = [hungarian(logits, boxes, targets)]
    if predictions.logits_o2m_LBQ is not None and predictions.boxes_o2m_LBQ4 is not None:
        logits_o2m, boxes_o2m = predictions.logits_o2m_LBQ.detach(), predictions.boxes_o2m_LBQ4.detach()
        if logits_o2m.shape != logits.shape:
            raise ValueError(
                f"both branches must have the same shape, got {tuple(logits.shape)} and {tuple(logits_o2m.shape)}"
            )
        tables.append(hungarian(logits_o2m[:-1], boxes_o2m[:-1], targets))
        tables.append(one_to_many(logits_o2m[-1], boxes_o2m[-1], targets)[None])

    facts = [targets.num_B, targets.mask_valid_T, targets.has_mask_pixels()]
    num_targets = len(targets.boxes_cxcywh_T4)
    packed = torch.cat([part.to(logits.device, torch.float32).flatten() for part in [*tables, *facts]])
    shape = (sum(map(len, tables)), num_targets, num_object_queries)
    return PendingMatches(packed, num_layers, num_queries, shape)


class PendingMatches:
    """Costs on their way from the device to the host."""

    def __init__(self, packed: Tensor, num_layers: int, num_queries: int, shape: tuple[int, int, int]) -> None:
        self._num_layers, self._num_queries, self._shape = num_layers, num_queries, shape
        self._device = packed.device
        self._arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._packed = packed

    def finish(self) -> Matches:
        """Wait for the costs and assign.

        Raises:
            FloatingPointError: a cost or a score is NaN or infinite; the message names branch, layer and query.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        num_layers, num_queries = self._num_layers, self._num_queries
        sizes = [int(np.prod(self._shape)), num_queries, self._shape[1]]
        flat_tables, num_B, mask_valid, has_pixels = np.split(self._packed.cpu().numpy(), np.cumsum(sizes))
        num_B = num_B.astype(np.int64)
        table = flat_tables.reshape(self._shape)
        query_of_target = np.repeat(np.arange(num_queries), num_B)
        _check_finite(table, query_of_target, num_layers)

        o2o = Pairs.from_rows(assign(table[:num_layers], num_B), num_layers, self._device)
        o2m = None
        if len(table) > num_layers:
            aux = assign(table[num_layers:-1], num_B)
            target, object_query = np.nonzero(table[-1])
            layer = np.full_like(target, num_layers - 1)
            final = np.stack([layer, query_of_target[target], object_query, target], axis=1)
            final = final[np.lexsort((final[:, 3], final[:, 2], final[:, 1]))]
            o2m = Pairs.from_rows(np.concatenate([aux, final]), num_layers, self._device)
        return Matches(o2o, o2m, num_B, mask_valid > 0, has_pixels > 0)


def assign(cost_LTQ: np.ndarray, num_B: np.ndarray) -> np.ndarray:
    """Cheapest one-to-one assignment within each query and layer; more targets than object queries leave some out.

    Returns (M, 4) int64 rows (layer, query, object query, packed target), ordered by layer, then packed target.
    """
    ends = np.cumsum(num_B)
    rows: list[np.ndarray] = []
    for layer, cost_TQ in enumerate(cost_LTQ):
        for query in np.flatnonzero(num_B):
            start = ends[query] - num_B[query]
            target, object_query = linear_sum_assignment(cost_TQ[start : ends[query]])
            columns = (np.full_like(target, layer), np.full_like(target, query), object_query, target + start)
            rows.append(np.stack(columns, axis=1))
    return np.concatenate(rows) if rows else np.zeros((0, 4), dtype=np.int64)


def _check_finite(table: np.ndarray, query_of_target: np.ndarray, num_layers: int) -> None:
    if np.isfinite(table).all():
        return
    layer, target, object_query = (int(index) for index in np.argwhere(~np.isfinite(table))[0])
    value = table[layer, target, object_query]
    branch, layer = ("one-to-one", layer) if layer < num_layers else ("one-to-many", layer - num_layers)
    raise FloatingPointError(
        f"matching cost must be finite, got {value} for query {query_of_target[target]} ({branch} branch, "
        f"decoder layer {layer}, object query {object_query}, packed target {target}): "
        "look for NaN in the predictions and for target boxes without area"
    )
