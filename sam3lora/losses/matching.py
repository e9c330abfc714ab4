"""Matching predictions with targets: Hungarian (one-to-one) and DAC-DETR's one-to-many rule.

Costs of all layers and both branches are computed on the device for each target against the object queries of its own
query (no padding), and go to the host in one transfer, where scipy solves the assignments while the device goes on.

Shapes: `L` layers, `B` queries, `Q` object queries, `T` packed targets, `M` matched pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .boxes import box_iou_and_giou, cxcywh_to_xyxy
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
        return self.of(_Candidates.of(logits_LBQ, boxes_cxcywh_LBQ4, *_packed(targets, logits_LBQ.device)))

    def of(self, candidates: _Candidates) -> Tensor:
        """The costs (L, T, Q) of candidates."""
        logits, probability = candidates.logits_LTQ, candidates.probability_LTQ
        positive = (1 - probability) ** self.gamma * F.softplus(-logits)
        negative = probability**self.gamma * F.softplus(logits)
        cost = torch.add(self.cost_class * self.alpha * positive, negative, alpha=-self.cost_class * (1 - self.alpha))
        cost = torch.add(cost, candidates.l1_LTQ, alpha=self.cost_bbox)
        return torch.add(cost, candidates.giou_LTQ, alpha=-self.cost_giou)


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
        return self.of(_Candidates.of(logits_BQ[None], boxes_cxcywh_BQ4[None], *_packed(targets, logits_BQ.device)))

    def of(self, candidates: _Candidates) -> Tensor:
        """The matches (T, Q) of the last layer of candidates."""
        probability_TQ, iou_TQ = candidates.probability_LTQ[-1], candidates.iou_LTQ[-1]
        if iou_TQ.numel() == 0:
            return torch.zeros_like(iou_TQ)
        score = self.alpha * probability_TQ + (1 - self.alpha) * iou_TQ
        best = score > _quantile(score, max(0.0, 1 - self.topk / score.shape[1]))
        matched = (best & (score > self.threshold)).float()
        return matched.masked_fill(~score.isfinite(), float("nan"))


def _quantile(values_TQ: Tensor, share: float) -> Tensor:
    """`torch.quantile` of each row (T, 1) to rounding; where the share is large, most values need not be sorted."""
    num = values_TQ.shape[1]
    rank = share * (num - 1)
    largest = values_TQ.topk(num - int(rank), dim=1).values
    above = largest[:, -2:-1] if largest.shape[1] > 1 else largest
    return torch.lerp(largest[:, -1:], above, rank % 1)


@dataclass(frozen=True)
class _Candidates:
    """Every object query beside every target of the same find query: what both rules of matching look at."""

    logits_LTQ: Tensor
    probability_LTQ: Tensor
    l1_LTQ: Tensor
    iou_LTQ: Tensor
    giou_LTQ: Tensor

    @classmethod
    def of(
        cls, logits_LBQ: Tensor, boxes_cxcywh_LBQ4: Tensor, query_index_T: Tensor, target_boxes_T4: Tensor
    ) -> _Candidates:
        logits_LTQ = logits_LBQ.index_select(1, query_index_T).float()
        boxes_LTQ4 = boxes_cxcywh_LBQ4.index_select(1, query_index_T).float()
        target_T14 = target_boxes_T4.float()[:, None]
        iou, giou = box_iou_and_giou(cxcywh_to_xyxy(boxes_LTQ4), cxcywh_to_xyxy(target_T14))
        l1 = (boxes_LTQ4 - target_T14).abs().sum(-1)
        return cls(logits_LTQ, logits_LTQ.sigmoid(), l1, iou, giou)


def _packed(targets: Targets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Find query and box of each target."""
    return targets.query_index().to(device), targets.boxes_cxcywh_T4.to(device)


@dataclass(frozen=True)
class CostTables:
    """What the host assigns by, for all layers of both branches at once."""

    hungarian: HungarianCost
    one_to_many: OneToManyRule

    @torch.no_grad()
    def __call__(
        self, logits_KBQ: Tensor, boxes_KBQ4: Tensor, query_index_T: Tensor, target_boxes_T4: Tensor, *, both: bool
    ) -> Tensor:
        """Costs (K, T, Q) of each target's candidates; with `both`, the last layer has the one-to-many matches."""
        candidates = _Candidates.of(logits_KBQ, boxes_KBQ4, query_index_T, target_boxes_T4)
        costs_KTQ = self.hungarian.of(candidates)
        if both:
            costs_KTQ[-1] = self.one_to_many.of(candidates)
        return costs_KTQ


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
        return cls._from_columns(columns, rows_M4, num_layers)

    @classmethod
    def _from_columns(cls, columns_4M: Sequence[Tensor] | Tensor, rows_M4: np.ndarray, num_layers: int) -> Pairs:
        counts = np.bincount(rows_M4[:, 0], minlength=num_layers).tolist()
        layer, query, object_query, target = columns_4M
        return cls(layer, query, object_query, target, counts, rows_M4)


@dataclass(frozen=True)
class Matches:
    """Matches of a batch, and facts about its targets on the host.

    `o2o` is Hungarian on all layers; `o2m` is Hungarian on the auxiliary layers and one-to-many on the final one.
    `joined` has the pairs of both, with the one-to-many layers numbered after the one-to-one layers.
    """

    o2o: Pairs
    o2m: Pairs | None
    joined: Pairs
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
    tables = CostTables(hungarian or HungarianCost(), one_to_many or OneToManyRule())
    return begin_match(predictions, targets, tables).finish()


def begin_match(predictions: Predictions, targets: Targets, tables: Callable[..., Tensor]) -> PendingMatches:
    """Compute the costs of both branches on the device and send them on their way to the host, waiting for nothing.

    `tables` is a `CostTables`, or does the same. What the device is given to do before `PendingMatches.finish` runs
    while the host assigns.

    Raises:
        ValueError: the branches differ in shape, or the targets are of another number of queries.
    """
    num_layers, num_queries, num_object_queries = predictions.logits_LBQ.shape
    if len(targets.num_B) != num_queries:
        raise ValueError(
            f"targets.num_B must have one count for each of {num_queries} queries, got {len(targets.num_B)}"
        )
    logits, boxes = predictions.joined()
    with torch.no_grad():
        query_index_T, target_boxes_T4 = _packed(targets, logits.device)
        costs = tables(logits, boxes, query_index_T, target_boxes_T4, both=len(logits) > num_layers)
        facts = [targets.num_B, targets.mask_valid_T, targets.has_mask_pixels()]
        packed = torch.cat([part.to(logits.device, torch.float32).flatten() for part in [costs, *facts]])
    shape = (len(logits), len(targets.boxes_cxcywh_T4), num_object_queries)
    return PendingMatches(packed, num_layers, num_queries, shape, (logits, boxes))


class PendingMatches:
    """Costs on their way from the device to the host; `joined` are the predictions of which they are."""

    def __init__(
        self,
        packed: Tensor,
        num_layers: int,
        num_queries: int,
        shape: tuple[int, int, int],
        joined: tuple[Tensor, Tensor],
    ) -> None:
        self._num_layers, self._num_queries, self._shape = num_layers, num_queries, shape
        self.joined = joined
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

        rows = [assign(table[:num_layers], num_B)]
        if len(table) > num_layers:
            target, object_query = np.nonzero(table[-1])
            layer = np.full_like(target, num_layers - 1)
            final = np.stack([layer, query_of_target[target], object_query, target], axis=1)
            final = final[np.lexsort((final[:, 3], final[:, 2], final[:, 1]))]
            rows.append(np.concatenate([assign(table[num_layers:-1], num_B), final]))
        return Matches(*self._on_device(rows), num_B, mask_valid > 0, has_pixels > 0)

    def _on_device(self, rows: list[np.ndarray]) -> tuple[Pairs, Pairs | None, Pairs]:
        """The pairs of each branch and of both, whose columns travel to the device together."""
        shifted = [rows_M4 + np.array([number * self._num_layers, 0, 0, 0]) for number, rows_M4 in enumerate(rows)]
        joined_M4, own_layer_M = np.concatenate(shifted), np.concatenate(rows)[:, 0]
        columns_5M = torch.from_numpy(np.vstack([joined_M4.T, own_layer_M])).to(self._device, non_blocking=True)
        joined = Pairs._from_columns(columns_5M[:4], joined_M4, len(rows) * self._num_layers)
        own = [columns_5M[4], *columns_5M[1:4]]
        split = zip(*(column.split([len(part) for part in rows]) for column in own), strict=True)
        branches = [
            Pairs._from_columns(columns, rows_M4, self._num_layers)
            for columns, rows_M4 in zip(split, rows, strict=True)
        ]
        return branches[0], branches[1] if len(branches) > 1 else None, joined


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
