"""SAM 3's training loss of one forward: matching, terms and their weighted sum.

    total = sqrt(queries) { sum over layers [5 bbox + 2 giou + 20 ce + 20 presence](o2o)
                            + 2 sum over layers [5 bbox + 2 giou + 20 ce](o2m)
                            + [200 mask + 10 dice](o2o) + 2 [200 mask + 10 dice](o2m)
                            + 20 semantic_seg + 30 semantic_dice }

Every term is a sum divided by a count of the whole optimizer step. So chunks, micro-batches and workers add up.

Where labels may be incomplete (`Targets.exhaustive_B` False), unmatched object queries have no classification loss in
either branch, as in SAM 3's weak loss, whose one class serves both; pixels without a label have no semantic loss. The
presence loss stays, as there: such a query has a target, so "present" is right whatever else the image shows. So do
boxes and masks, which are compared for matched pairs only.

Shapes as in `targets.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sam3lora.config.loss import LossSection

from .masks import PointSampling, mask_loss_sums, semantic_loss_sums, union_of_masks
from .matching import HungarianCost, Matches, OneToManyRule, Pairs, PendingMatches, begin_match
from .targets import Predictions, Targets
from .terms import Normalizer, box_terms, iabce_term, presence_term, visible_queries


@dataclass
class LossOutput:
    """The loss of one call; `total` is a scalar with its graph, weighted and scaled.

    `terms` (scalars, summed over layers) and `per_layer` (L,) are detached, unweighted and without the square root;
    those of chunks add up. `diagnostics` are means (L,): `ce_f1`, F1 in [0, 1] of one-to-one logits at probability 0.5
    against matched or not (0 when undefined), and `presence_accuracy`, the share of queries whose presence is right at
    probability 0.5.
    """

    total: Tensor
    terms: dict[str, Tensor]
    per_layer: dict[str, Tensor]
    matches: Matches
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


class Criterion:
    """SAM 3's loss for one-to-one and one-to-many branches, boxes, presence, masks and semantic masks.

    The classification term divides by at least `pad_n_queries` object queries (None: by Q). `mask_chunk` masks are
    compared at a time, which bounds the memory. `weights` has the factor of each entry of `LossOutput.terms`.

    Where no pair has a mask and gradients are on, `touch_unused` asks `mask_logits` and `semantic_logits` for their
    first entry all the same and multiplies it by zero. Then every parameter has a gradient, as DistributedDataParallel
    needs. False saves that forward.
    """

    def __init__(
        self,
        settings: LossSection | None = None,
        *,
        hungarian: HungarianCost | None = None,
        one_to_many: OneToManyRule | None = None,
        pad_n_queries: int | None = 200,
        mask_chunk: int = 16,
        touch_unused: bool = True,
    ) -> None:
        settings = settings or LossSection()
        self.weights = settings.by_term()
        self.hungarian, self.one_to_many = hungarian or HungarianCost(), one_to_many or OneToManyRule()
        self._classify = partial(iabce_term, pad_n_queries=pad_n_queries, pos_weight=settings.pos_weight)
        self._sampling = None if settings.mask_points is None else PointSampling(settings.mask_points)
        self._mask_chunk, self._touch_unused = mask_chunk, touch_unused

    def begin(self, predictions: Predictions, targets: Targets) -> PendingMatches:
        """Start matching, which needs only logits and boxes, so that masks can be made while the host assigns."""
        return begin_match(predictions, targets, self.hungarian, self.one_to_many)

    def __call__(
        self,
        predictions: Predictions,
        targets: Targets,
        normalizer: Normalizer | None = None,
        pending: PendingMatches | None = None,
    ) -> LossOutput:
        """Loss of one forward, whose `pending` matches `begin` has started.

        Without `normalizer`, terms are divided by the counts of this batch alone.

        Raises:
            FloatingPointError: a matching cost is not finite; the message names the query.
            ValueError: predictions and targets disagree in shape.
        """
        matches = (pending or self.begin(predictions, targets)).finish()
        query_of_target = np.repeat(np.arange(len(matches.num_targets_B)), matches.num_targets_B)
        semantic_queries = np.unique(query_of_target[matches.has_mask_pixels_T])
        if normalizer is None:
            num_boxes = len(targets.boxes_cxcywh_T4)
            normalizer = Normalizer.from_counts(len(targets.num_B), num_boxes, len(semantic_queries))

        per_layer, diagnostics = self._layer_terms(predictions, targets, matches, normalizer)
        scalars = {
            **self._mask_terms("o2o", matches.o2o, predictions, targets, matches, normalizer),
            **self._mask_terms("o2m", matches.o2m, predictions, targets, matches, normalizer),
            **self._semantic_terms(semantic_queries, predictions, targets, matches, normalizer),
        }
        terms = {name: values.sum() for name, values in per_layer.items()} | scalars
        total = torch.zeros((), device=predictions.logits_LBQ.device)
        for name, value in terms.items():
            total = total + self.weights[name] * value
        return LossOutput(
            total=normalizer.scale * total,
            terms={name: value.detach() for name, value in terms.items()},
            per_layer={name: values.detach() for name, values in per_layer.items()},
            matches=matches,
            diagnostics=diagnostics,
        )

    def _layer_terms(
        self, predictions: Predictions, targets: Targets, matches: Matches, normalizer: Normalizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        device = predictions.logits_LBQ.device
        target_boxes = targets.boxes_cxcywh_T4.to(device)
        present_B = visible_queries(target_boxes, targets.query_index().to(device), len(targets.num_B))
        exhaustive_B = None if targets.exhaustive_B is None else targets.exhaustive_B.to(device)

        def branch_terms(logits: Tensor, boxes: Tensor, pairs: Pairs, suffix: str) -> tuple[dict[str, Tensor], Tensor]:
            bbox, giou = box_terms(boxes, target_boxes, pairs, normalizer.num_boxes)
            ce, matched = self._classify(
                logits, boxes, target_boxes, pairs, present_B, normalizer.num_queries, exhaustive_B=exhaustive_B
            )
            return {f"loss_bbox{suffix}": bbox, f"loss_giou{suffix}": giou, f"loss_ce{suffix}": ce}, matched

        per_layer, matched = branch_terms(predictions.logits_LBQ, predictions.boxes_cxcywh_LBQ4, matches.o2o, "")
        presence = predictions.presence_logits_LB
        per_layer["presence_loss"] = presence_term(presence, present_B, normalizer.num_queries)
        logits_o2m, boxes_o2m = predictions.logits_o2m_LBQ, predictions.boxes_o2m_LBQ4
        if logits_o2m is not None and boxes_o2m is not None and matches.o2m is not None:
            per_layer |= branch_terms(logits_o2m, boxes_o2m, matches.o2m, "_o2m")[0]
        diagnostics = {
            "ce_f1": _f1(predictions.logits_LBQ.detach() > 0, matched),
            "presence_accuracy": ((presence.detach() > 0) == (present_B > 0)).float().mean(dim=1),
        }
        return per_layer, diagnostics

    def _mask_terms(
        self,
        branch: str,
        pairs: Pairs | None,
        predictions: Predictions,
        targets: Targets,
        matches: Matches,
        normalizer: Normalizer,
    ) -> dict[str, Tensor]:
        if pairs is None:
            return {}
        suffix, device = ("" if branch == "o2o" else "_o2m"), predictions.logits_LBQ.device
        focal = dice = torch.zeros((), device=device)
        if predictions.mask_logits is None:
            return {f"loss_mask{suffix}": focal, f"loss_dice{suffix}": dice}
        rows = pairs.host_M4[pairs.host_M4[:, 0] == len(pairs.num_per_layer) - 1]
        rows = rows[matches.mask_valid_T[rows[:, 3]]]
        if targets.masks_THW is not None and len(rows):
            _, query, object_query, target = torch.from_numpy(np.ascontiguousarray(rows.T))
            logits = predictions.mask_logits(branch, query, object_query)
            target = target.to(targets.masks_THW.device, non_blocking=True)
            focal, dice = mask_loss_sums(logits, targets.masks_THW, target, self._sampling, self._mask_chunk)
        elif self._must_touch(targets):
            first = torch.zeros(1, dtype=torch.long)
            focal = 0.0 * predictions.mask_logits(branch, first, first).float().sum()
        return {f"loss_mask{suffix}": focal / normalizer.num_boxes, f"loss_dice{suffix}": dice / normalizer.num_boxes}

    def _semantic_terms(
        self,
        queries: np.ndarray,
        predictions: Predictions,
        targets: Targets,
        matches: Matches,
        normalizer: Normalizer,
    ) -> dict[str, Tensor]:
        device = predictions.logits_LBQ.device
        focal = dice = torch.zeros((), device=device)
        if predictions.semantic_logits is None:
            return {"loss_semantic_seg": focal, "loss_semantic_dice": dice}
        masks = targets.masks_THW
        if masks is not None and len(queries):
            ends = np.cumsum(matches.num_targets_B)
            ranges = [(int(ends[query] - matches.num_targets_B[query]), int(ends[query])) for query in queries]
            valid = targets.mask_valid_T.to(masks.device)
            rows = torch.from_numpy(queries)
            exhaustive_B = targets.exhaustive_B
            focal, dice = semantic_loss_sums(
                predictions.semantic_logits(rows),
                lambda start, end: union_of_masks(masks, valid, ranges[start:end]),
                chunk_size=self._mask_chunk,
                exhaustive_K=None if exhaustive_B is None else exhaustive_B[rows.to(exhaustive_B.device)],
            )
        elif self._must_touch(targets):
            first = torch.zeros(1, dtype=torch.long)
            focal = 0.0 * predictions.semantic_logits(first).float().sum()
        return {
            "loss_semantic_seg": focal / normalizer.num_semantic,
            "loss_semantic_dice": dice / normalizer.num_semantic,
        }

    def _must_touch(self, targets: Targets) -> bool:
        return self._touch_unused and torch.is_grad_enabled() and len(targets.num_B) > 0


def _f1(predicted_LBQ: Tensor, matched_LBQ: Tensor) -> Tensor:
    both = (predicted_LBQ & matched_LBQ).sum(dim=(1, 2))
    either = predicted_LBQ.sum(dim=(1, 2)) + matched_LBQ.sum(dim=(1, 2))
    return 2 * both / either.clamp(min=1)
