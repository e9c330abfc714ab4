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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sam3lora.config.loss import LossSection

from .masks import PointSampling, mask_loss_sums, semantic_loss_sums, union_of_masks
from .matching import CostTables, HungarianCost, Matches, OneToManyRule, Pairs, PendingMatches, begin_match
from .targets import Predictions, Targets
from .terms import Normalizer, box_terms, iabce_term, presence_term, visible_queries


@dataclass
class LossOutput:
    """The loss of one call; `total` is a scalar with its graph, weighted and scaled.

    `terms` (scalars, summed over layers) and `per_layer` (L,) are detached, unweighted and without the square root;
    those of chunks add up.
    """

    total: Tensor
    terms: dict[str, Tensor]
    per_layer: dict[str, Tensor]
    matches: Matches
    _diagnose: Callable[[], dict[str, Tensor]]

    def diagnostics(self) -> dict[str, Tensor]:
        """Means (L,): `ce_f1`, F1 in [0, 1] of one-to-one logits at probability 0.5 against matched or not (0 when
        undefined), and `presence_accuracy`, the share of queries whose presence is right at probability 0.5.
        """
        return self._diagnose()


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
        mask_chunk: int = 32,
        touch_unused: bool = True,
    ) -> None:
        settings = settings or LossSection()
        self.weights = settings.by_term()
        self.tables: Callable[..., Tensor] = CostTables(hungarian or HungarianCost(), one_to_many or OneToManyRule())
        self._classify = partial(iabce_term, pad_n_queries=pad_n_queries, pos_weight=settings.pos_weight)
        self._sampling = None if settings.mask_points is None else PointSampling(settings.mask_points)
        self._mask_chunk, self._touch_unused = mask_chunk, touch_unused
        self._sent_weights: dict[tuple, Tensor] = {}

    def begin(self, predictions: Predictions, targets: Targets) -> PendingMatches:
        """Start matching, which needs only logits and boxes, so that masks can be made while the host assigns."""
        return begin_match(predictions, targets, self.tables)

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
        pending = pending or self.begin(predictions, targets)
        matches = pending.finish()
        query_of_target = np.repeat(np.arange(len(matches.num_targets_B)), matches.num_targets_B)
        semantic_queries = np.unique(query_of_target[matches.has_mask_pixels_T])
        if normalizer is None:
            num_boxes = len(targets.boxes_cxcywh_T4)
            normalizer = Normalizer.from_counts(len(targets.num_B), num_boxes, len(semantic_queries))

        per_layer, diagnose = self._layer_terms(predictions, pending.joined, targets, matches, normalizer)
        names, values = list(per_layer), [torch.stack([*per_layer.values()]).sum(dim=1)]
        for branch, pairs, suffix in (("o2o", matches.o2o, ""), ("o2m", matches.o2m, "_o2m")):
            if pairs is not None:
                names += [f"loss_mask{suffix}", f"loss_dice{suffix}"]
                values.append(self._mask_sums(branch, pairs, predictions, targets, matches) / normalizer.num_boxes)
        names += ["loss_semantic_seg", "loss_semantic_dice"]
        values.append(self._semantic_sums(semantic_queries, predictions, targets, matches) / normalizer.num_semantic)
        terms = torch.cat(values)
        total = normalizer.scale * torch.dot(terms, self._weights_of(names, terms))
        return LossOutput(
            total=total,
            terms=dict(zip(names, terms.detach().unbind(), strict=True)),
            per_layer={name: values_L.detach() for name, values_L in per_layer.items()},
            matches=matches,
            _diagnose=diagnose,
        )

    def _weights_of(self, names: Sequence[str], like: Tensor) -> Tensor:
        """Weights of terms, on the device of the terms; they are sent there once."""
        key = (*names, like.device, like.dtype)
        if key not in self._sent_weights:
            self._sent_weights[key] = like.new_tensor([self.weights[name] for name in names])
        return self._sent_weights[key]

    def _layer_terms(
        self,
        predictions: Predictions,
        joined: tuple[Tensor, Tensor],
        targets: Targets,
        matches: Matches,
        normalizer: Normalizer,
    ) -> tuple[dict[str, Tensor], Callable[[], dict[str, Tensor]]]:
        """Terms of every decoder layer (L,), those of both branches computed at once, and what gives diagnostics."""
        logits_KBQ, boxes_KBQ4 = joined
        device, pairs = logits_KBQ.device, matches.joined
        target_boxes = targets.boxes_cxcywh_T4.to(device)
        present_B = visible_queries(target_boxes, targets.query_index().to(device), len(targets.num_B))
        exhaustive_B = None if targets.exhaustive_B is None else targets.exhaustive_B.to(device)
        bbox, giou, iou_M = box_terms(boxes_KBQ4, target_boxes, pairs, normalizer.num_boxes)
        ce, matched = self._classify(
            logits_KBQ,
            boxes_KBQ4,
            target_boxes,
            pairs,
            present_B,
            normalizer.num_queries,
            exhaustive_B=exhaustive_B,
            iou_M=iou_M,
        )
        num_layers, presence = len(predictions.logits_LBQ), predictions.presence_logits_LB
        per_layer: dict[str, Tensor] = {}
        for name, values_K in {"loss_bbox": bbox, "loss_giou": giou, "loss_ce": ce}.items():
            per_layer |= zip((name, f"{name}_o2m"), values_K.split(num_layers), strict=False)
        per_layer["presence_loss"] = presence_term(presence, present_B, normalizer.num_queries)

        def diagnose() -> dict[str, Tensor]:
            return {
                "ce_f1": _f1(predictions.logits_LBQ.detach() > 0, matched[:num_layers]),
                "presence_accuracy": ((presence.detach() > 0) == (present_B > 0)).float().mean(dim=1),
            }

        return per_layer, diagnose

    def _mask_sums(
        self, branch: str, pairs: Pairs, predictions: Predictions, targets: Targets, matches: Matches
    ) -> Tensor:
        """Sums over pairs of the last layer (2,): focal and dice."""
        if predictions.mask_logits is not None:
            rows = pairs.host_M4[pairs.host_M4[:, 0] == len(pairs.num_per_layer) - 1]
            rows = rows[matches.mask_valid_T[rows[:, 3]]]
            if targets.masks_THW is not None and len(rows):
                _, query, object_query, target = torch.from_numpy(np.ascontiguousarray(rows.T))
                logits = predictions.mask_logits(branch, query, object_query)
                target = target.to(targets.masks_THW.device, non_blocking=True)
                return mask_loss_sums(logits, targets.masks_THW, target, self._sampling, self._mask_chunk)
            if self._must_touch(targets):
                first = torch.zeros(1, dtype=torch.long)
                return _zero_of(predictions.mask_logits(branch, first, first))
        return torch.zeros(2, device=predictions.logits_LBQ.device)

    def _semantic_sums(
        self, queries: np.ndarray, predictions: Predictions, targets: Targets, matches: Matches
    ) -> Tensor:
        """Sums over queries with a semantic target (2,): focal and dice."""
        if predictions.semantic_logits is not None:
            masks = targets.masks_THW
            if masks is not None and len(queries):
                ends = np.cumsum(matches.num_targets_B)
                ranges = [(int(ends[query] - matches.num_targets_B[query]), int(ends[query])) for query in queries]
                valid = targets.mask_valid_T.to(masks.device)
                rows = torch.from_numpy(queries)
                exhaustive_B = targets.exhaustive_B
                return semantic_loss_sums(
                    predictions.semantic_logits(rows),
                    lambda start, end: union_of_masks(masks, valid, ranges[start:end]),
                    chunk_size=self._mask_chunk,
                    exhaustive_K=None if exhaustive_B is None else exhaustive_B[rows.to(exhaustive_B.device)],
                )
            if self._must_touch(targets):
                return _zero_of(predictions.semantic_logits(torch.zeros(1, dtype=torch.long)))
        return torch.zeros(2, device=predictions.logits_LBQ.device)

    def _must_touch(self, targets: Targets) -> bool:
        return self._touch_unused and torch.is_grad_enabled() and len(targets.num_B) > 0


def _zero_of(logits: Tensor) -> Tensor:
    """Zeros (2,) that depend on the logits."""
    return (0.0 * logits.float().sum()).expand(2)


def _f1(predicted_LBQ: Tensor, matched_LBQ: Tensor) -> Tensor:
    both = (predicted_LBQ & matched_LBQ).sum(dim=(1, 2))
    either = predicted_LBQ.sum(dim=(1, 2)) + matched_LBQ.sum(dim=(1, 2))
    return 2 * both / either.clamp(min=1)
