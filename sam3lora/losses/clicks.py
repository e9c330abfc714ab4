"""The training loss of the click head: of all masks that answer one prompt about some objects.

Of one object with predicted masks j, the IoU and the object score that the head expects:

    focal  mean over pixels (alpha 0.25, gamma 2) of the cheapest mask
    dice   of the cheapest mask
    iou    mean over all masks of |expected IoU - IoU of the mask cut at 0|
    object binary cross-entropy of "the object is there"

The cheapest mask is that of the smallest weighted focal + dice; the others get no gradient from these two. An object
with an empty mask has the last term only. These are the terms of SAM 2 (Ravi et al. 2024,
https://arxiv.org/abs/2408.00714) with the weights of its fine-tuning.

Every term is a sum over objects divided by the number of objects of the whole optimizer step, so the prompts of an
interaction, micro-batches and workers add up. All is computed in float32.

Shapes: `N` objects, `M` masks that answer a prompt (3 or 1), `h` `w` predicted pixels, `H` `W` pixels of the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sam3lora.config.clicks import ClickLossSection

from .focal_dice import resize
from .terms import binary_cross_entropy, sigmoid_focal, soft_dice

CLICK_WEIGHTS: Mapping[str, float] = ClickLossSection().by_term()
"""The factor of each term in the loss, where a run says nothing else."""


@dataclass(frozen=True)
class ClickLossOutput:
    """The loss of the answers to one prompt.

    Attributes:
        total: The weighted sum of the terms, with gradient.
        terms: The terms without weight and without gradient.
        cheapest_N: Index of the mask that focal and dice are of.
        iou_NM: IoU of each mask, cut at 0, with the truth; 1 where both are empty.
    """

    total: Tensor
    terms: dict[str, Tensor]
    cheapest_N: Tensor
    iou_NM: Tensor


class ClickCriterion:
    """The loss of answers of the click head.

    Args:
        weights: The factor of each term.
    """

    def __init__(self, weights: Mapping[str, float] = CLICK_WEIGHTS) -> None:
        assert weights.keys() == CLICK_WEIGHTS.keys(), weights
        self.weights = dict(weights)

    def __call__(
        self,
        logits_NMhw: Tensor,
        expected_iou_NM: Tensor,
        object_logits_N: Tensor,
        truth_NHW: Tensor,
        num_objects: float,
        world_size: int = 1,
    ) -> ClickLossOutput:
        """Loss of the answers to one prompt about some objects of an optimizer step.

        Args:
            logits_NMhw: Masks before the cut at 0. They are resized to the truth where the sizes differ.
            expected_iou_NM: The IoU that the head expects of each mask, in [0, 1].
            object_logits_N: Above 0 where the head sees the object.
            truth_NHW: bool; an object may be empty.
            num_objects: Objects of the whole step, of all its batches and workers.
            world_size: Number of workers whose gradients are averaged.
        """
        with torch.autocast(logits_NMhw.device.type, enabled=False):
            present_N = truth_NHW.flatten(1).any(dim=1)
            with torch.no_grad():
                costs_NM, iou_NM = self._compare_all(logits_NMhw, truth_NHW)
                cheapest_N = costs_NM.argmin(dim=1)
            chosen_Nhw = logits_NMhw.take_along_dim(cheapest_N[:, None, None, None], dim=1)[:, 0]
            focal_N, dice_N = _focal_and_dice(chosen_Nhw, truth_NHW)
            iou_N = (expected_iou_NM.float() - iou_NM).abs().mean(dim=1)
            object_N = binary_cross_entropy(object_logits_N.float(), present_N.float())
            share = world_size / (num_objects or 1)
            sums = [(term_N * present_N).sum() * share for term_N in (focal_N, dice_N, iou_N)]
            terms = dict(zip(CLICK_WEIGHTS, [*sums, object_N.sum() * share], strict=True))
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return ClickLossOutput(total, {name: term.detach() for name, term in terms.items()}, cheapest_N, iou_NM)

    def _compare_all(self, logits_NMhw: Tensor, truth_NHW: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted focal + dice, and the IoU, of each mask (N, M), one mask of every object at a time."""
        costs, ious = [], []
        for logits_Nhw in logits_NMhw.unbind(dim=1):
            focal_N, dice_N = _focal_and_dice(logits_Nhw, truth_NHW)
            costs.append(self.weights["click_focal"] * focal_N + self.weights["click_dice"] * dice_N)
            ious.append(mask_iou(resize(logits_Nhw, truth_NHW.shape[1:]) > 0, truth_NHW))
        return torch.stack(costs, dim=1), torch.stack(ious, dim=1)


def mask_iou(found_NHW: Tensor, truth_NHW: Tensor) -> Tensor:
    """IoU (N,) in [0, 1] of bool masks, float32; 1 where both are empty."""
    found_NP, truth_NP = found_NHW.flatten(1), truth_NHW.flatten(1)
    union_N = (found_NP | truth_NP).sum(dim=1)
    return torch.where(union_N > 0, (found_NP & truth_NP).sum(dim=1) / union_N.clamp(min=1), 1.0)


def _focal_and_dice(logits_Nhw: Tensor, truth_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean focal loss and dice loss (N,) of masks resized to the truth."""
    logits_NP = resize(logits_Nhw, truth_NHW.shape[1:]).flatten(1)
    truth_NP = truth_NHW.flatten(1).float()
    return sigmoid_focal(logits_NP, truth_NP, alpha=0.25, gamma=2.0).mean(dim=1), soft_dice(logits_NP, truth_NP)
