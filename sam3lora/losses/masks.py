"""Mask terms of matched pairs and the semantic term. They work in chunks to limit full-resolution buffers.

Shapes: `M` matched pairs with a valid mask, `K` queries with a semantic target, `P` sampled points, `T` packed targets,
`H` `W` target pixels, `h` `w` predicted pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .focal_dice import focal_and_dice, resize
from .terms import sigmoid_focal, soft_dice


@dataclass(frozen=True)
class PointSampling:
    """PointRend's choice of points for the mask loss, https://arxiv.org/abs/1912.08193 (values of Mask2Former).

    Of `num_points * oversample_ratio` uniform points, the `importance_ratio * num_points` most uncertain ones (least
    |logit|) are taken, and the rest of `num_points` uniformly.
    """

    num_points: int
    oversample_ratio: float = 3.0
    importance_ratio: float = 0.75


def mask_loss_sums(
    logits_Mhw: Tensor,
    masks_THW: Tensor,
    target_index_M: Tensor,
    sampling: PointSampling | None = None,
    chunk_size: int = 32,
) -> Tensor:
    """(2,): sum over pairs of the mean focal loss (alpha 0.25, gamma 2), and of the dice loss; divide by the boxes.

    Unless points are sampled, logits are resized bilinearly to the size of the masks. The masks and `target_index_M`
    (long) may be on another device than the logits. Masks that are not bool, such as samples of masks, are soft labels.
    The backward pass recomputes the terms of points and soft labels instead of keeping their buffers.
    """
    sums = []
    for logits, target_index in zip(logits_Mhw.split(chunk_size), target_index_M.split(chunk_size), strict=True):
        masks = masks_THW[target_index].to(logits.device)
        if sampling is not None:
            sums.append(_recomputed(_compare_points, logits, masks, choose_points(logits, sampling)))
        elif masks.dtype != torch.bool:
            sums.append(_recomputed(_compare, logits, masks))
        else:
            sums.append(focal_and_dice(logits, masks, 0.25))
    return _total(sums, logits_Mhw)


def semantic_loss_sums(
    logits_Khw: Tensor,
    target_of: Callable[[int, int], Tensor],
    chunk_size: int = 32,
    exhaustive_K: Tensor | None = None,
) -> Tensor:
    """(2,): sum over queries of the mean focal loss (alpha 0.6, gamma 2), and of the dice loss; divide by their number.

    No target may be empty. `target_of` maps (start, end) to the targets of these rows, (end - start, H, W) bool. It is
    a function, so that not all targets exist at once. Where `exhaustive_K` (bool) is False, pixels outside of a target
    may show objects without a label: they have no loss, and the mean still divides by all pixels.
    """
    sums = []
    if exhaustive_K is not None:
        exhaustive_K = exhaustive_K.to(logits_Khw.device)
    for start in range(0, len(logits_Khw), chunk_size):
        end = min(start + chunk_size, len(logits_Khw))
        masks = target_of(start, end).to(logits_Khw.device)
        exhaustive = None if exhaustive_K is None else exhaustive_K[start:end]
        sums.append(focal_and_dice(logits_Khw[start:end], masks, 0.6, exhaustive))
    return _total(sums, logits_Khw)


def union_of_masks(masks_THW: Tensor, mask_valid_T: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """(len(ranges), H, W) bool: for each range of packed targets, the pixels of any valid mask."""
    unions = [(masks_THW[start:end].bool() & mask_valid_T[start:end, None, None]).any(dim=0) for start, end in ranges]
    return torch.stack(unions) if unions else masks_THW.new_zeros((0, *masks_THW.shape[1:]), dtype=torch.bool)


def sample_points(values_Mhw: Tensor, coords_xy_MP2: Tensor) -> Tensor:
    """(M, P) bilinear values at points given as (x, y) in [0, 1] of the image; zero outside, align_corners False."""
    grid = (2 * coords_xy_MP2 - 1)[:, None]
    return F.grid_sample(values_Mhw.float()[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0, 0]


@torch.no_grad()
def choose_points(logits_Mhw: Tensor, sampling: PointSampling) -> Tensor:
    """(M, num_points, 2) random points (x, y) in [0, 1], mostly where the prediction is uncertain."""
    num_masks, num_uncertain = len(logits_Mhw), int(sampling.importance_ratio * sampling.num_points)
    uniform = torch.rand(num_masks, sampling.num_points - num_uncertain, 2, device=logits_Mhw.device)
    if num_uncertain == 0:
        return uniform
    num_candidates = max(int(sampling.num_points * sampling.oversample_ratio), num_uncertain)
    candidates = torch.rand(num_masks, num_candidates, 2, device=logits_Mhw.device)
    certainty = sample_points(logits_Mhw, candidates).abs()
    uncertain = certainty.topk(num_uncertain, dim=1, largest=False).indices
    return torch.cat([candidates.gather(1, uncertain[..., None].expand(-1, -1, 2)), uniform], dim=1)


def _total(sums: list[Tensor], like: Tensor) -> Tensor:
    if len(sums) > 1:
        return torch.stack(sums).sum(dim=0)
    return sums[0] if sums else like.new_zeros(2, dtype=torch.float32)


def _compare_points(logits: Tensor, masks: Tensor, coords: Tensor) -> Tensor:
    return _focal_and_dice(sample_points(logits, coords), sample_points(masks, coords))


def _compare(logits: Tensor, masks: Tensor) -> Tensor:
    return _focal_and_dice(resize(logits, masks.shape[1:]), masks)


def _focal_and_dice(logits: Tensor, targets: Tensor) -> Tensor:
    logits, targets = logits.flatten(1), targets.flatten(1).float()
    focal = sigmoid_focal(logits, targets, alpha=0.25, gamma=2.0)
    return torch.stack([focal.mean(dim=1).sum(), soft_dice(logits, targets).sum()])


def _recomputed(function: Callable[..., Tensor], logits: Tensor, *arguments: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return function(logits, *arguments)
    result = checkpoint(function, logits, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
