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
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Sum over pairs of the mean focal loss (alpha 0.25, gamma 2) and of the dice loss; divide by the number of boxes.

    Unless points are sampled, logits are resized bilinearly to the size of the masks, which are bool. The masks and
    `target_index_M` (long) may be on another device than the logits. The backward pass recomputes each chunk of pairs
    instead of keeping its buffers.
    """

    def compare(logits: Tensor, target_index: Tensor) -> Tensor:
        masks = masks_THW[target_index].to(logits.device)
        return _focal_and_dice(resize(logits, masks.shape[1:]), masks, alpha=0.25)

    def compare_points(logits: Tensor, target_index: Tensor, coords: Tensor) -> Tensor:
        masks = masks_THW[target_index].to(logits.device)
        return _focal_and_dice(sample_points(logits, coords), sample_points(masks, coords), alpha=0.25)

    sums = logits_Mhw.new_zeros(2, dtype=torch.float32)
    for logits, target_index in zip(logits_Mhw.split(chunk_size), target_index_M.split(chunk_size), strict=True):
        if sampling is None:
            sums = sums + _recomputed(compare, logits, target_index)
        else:
            sums = sums + _recomputed(compare_points, logits, target_index, choose_points(logits, sampling))
    return sums[0], sums[1]


def semantic_loss_sums(
    logits_Khw: Tensor,
    target_of: Callable[[int, int], Tensor],
    chunk_size: int = 16,
    exhaustive_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over queries of the mean focal loss (alpha 0.6, gamma 2) and of the dice loss; divide by their number.

    No target may be empty. `target_of` maps (start, end) to the targets of these rows, (end - start, H, W) bool. It is
    a function, so that not all targets exist at once. Where `exhaustive_K` (bool) is False, pixels outside of a target
    may show objects without a label: they have no loss, and the mean still divides by all pixels.
    """

    def compare(logits: Tensor, start: int, end: int) -> Tensor:
        masks = target_of(start, end).to(logits.device)
        known = None
        if exhaustive_K is not None:
            known = masks | exhaustive_K[start:end, None, None].to(logits.device)
        return _focal_and_dice(resize(logits, masks.shape[1:]), masks, alpha=0.6, known=known)

    sums = logits_Khw.new_zeros(2, dtype=torch.float32)
    for start in range(0, len(logits_Khw), chunk_size):
        end = min(start + chunk_size, len(logits_Khw))
        sums = sums + _recomputed(compare, logits_Khw[start:end], start, end)
    return sums[0], sums[1]


def union_of_masks(masks_THW: Tensor, mask_valid_T: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """(len(ranges), H, W) bool: for each range of packed targets, the pixels of any valid mask."""
    unions = [(masks_THW[start:end].bool() & mask_valid_T[start:end, None, None]).any(dim=0) for start, end in ranges]
    return torch.stack(unions) if unions else masks_THW.new_zeros((0, *masks_THW.shape[1:]), dtype=torch.bool)


def resize(values_Mhw: Tensor, size_hw: tuple[int, ...]) -> Tensor:
    """Bilinear (M, H, W) in fp32 with align_corners False."""
    if tuple(values_Mhw.shape[1:]) == tuple(size_hw):
        return values_Mhw.float()
    return F.interpolate(values_Mhw.float()[:, None], size=tuple(size_hw), mode="bilinear", align_corners=False)[:, 0]


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


def _focal_and_dice(logits: Tensor, targets: Tensor, alpha: float, known: Tensor | None = None) -> Tensor:
    logits, targets = logits.flatten(1), targets.flatten(1).float()
    focal = sigmoid_focal(logits, targets, alpha, gamma=2.0)
    if known is not None:
        known = known.flatten(1)
        focal = focal * known
    return torch.stack([focal.mean(dim=1).sum(), soft_dice(logits, targets, known).sum()])


def _recomputed(function: Callable[..., Tensor], logits: Tensor, *arguments: Tensor | int) -> Tensor:
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return function(logits, *arguments)
    result = checkpoint(function, logits, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
