"""Focal and dice loss of masks with their gradient, computed at once and with few full-resolution tensors.

A mask of 1008 x 1008 pixels is 4 MB in fp32, and autograd writes some 60 tensors of that size for a pair. Here values
and gradients are made in one pass: only the gradients at the resolution of the predicted logits are kept, and the
backward pass multiplies them by two numbers.

Shapes: `M` masks, `H` `W` target pixels, `h` `w` predicted pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def focal_and_dice(logits_Mhw: Tensor, masks_MHW: Tensor, alpha: float, exhaustive_M: Tensor | None = None) -> Tensor:
    """(2,): sum over masks of the mean focal loss (gamma 2), and of the dice loss, of logits resized to the bool masks.

    The formulas are those of `terms.sigmoid_focal` and `terms.soft_dice`. Where `exhaustive_M` (bool) is False, only
    pixels of the mask count, and the mean still divides by all.
    """
    return _FocalAndDice.apply(logits_Mhw, masks_MHW, alpha, exhaustive_M)  # type: ignore[no-untyped-call]


def resize(values_Mhw: Tensor, size_hw: tuple[int, ...]) -> Tensor:
    """Bilinear (M, H, W) in fp32 (fp64 stays) with align_corners False."""
    values_Mhw = values_Mhw.to(torch.promote_types(values_Mhw.dtype, torch.float32))
    if tuple(values_Mhw.shape[1:]) == tuple(size_hw):
        return values_Mhw
    return F.interpolate(values_Mhw[:, None], size=tuple(size_hw), mode="bilinear", align_corners=False).squeeze(1)


class _FocalAndDice(torch.autograd.Function):
    """With y the mask, x the resized logit, z = (1 - 2y) x, s = sigmoid(z) = |sigmoid(x) - y| and v = softplus(z):

    focal      = w s^2 v,    w = 1 - alpha outside of the mask, alpha inside
    d focal/dx = (1 - 2y) w s^2 (s + 2 (1 - s) v)
    dice       = 1 - (2 overlap + 1) / D,    overlap = sum of (1 - s) inside,  D = sum of sigmoid(x) + sum of y + 1
    d dice/dx  = ((2 overlap + 1) / D^2 - 2 y / D) s (1 - s)
    """

    @staticmethod
    def forward(ctx: Any, logits_Mhw: Tensor, masks_MHW: Tensor, alpha: float, exhaustive_M: Tensor | None) -> Tensor:
        with torch.enable_grad():
            small = logits_Mhw.detach().requires_grad_(ctx.needs_input_grad[0])
            large = resize(small, masks_MHW.shape[1:])
        y, ratio, num_pixels = masks_MHW, -1 / (1 - alpha), masks_MHW.shape[1] * masks_MHW.shape[2]
        z = torch.addcmul(large.detach(), large.detach(), y, value=-2)
        s, v = z.sigmoid(), F.softplus(z)
        del z
        if exhaustive_M is not None:
            s.mul_(y | exhaustive_M[:, None, None])  # s is a factor of all that follows

        # w with the sign of the gradient is (1 - alpha) (1 + ratio y)
        signed = torch.addcmul(s, s, y, value=ratio)
        all_M, size_M = s.sum(dim=(1, 2)), y.sum(dim=(1, 2))
        missed_M = (signed.sum(dim=(1, 2)) - all_M) / ratio  # the sum of s inside
        found_M = size_M - missed_M
        twice_found_M = (2 * found_M).add_(1)
        size_of_both_M = all_M + twice_found_M
        share_M = twice_found_M / size_of_both_M
        dice = (1 - share_M).sum()

        signed.mul_(s)
        zero = torch.zeros(1, dtype=v.dtype, device=v.device)
        twice = torch.addcmul(zero, signed, v, value=2)  # 2 w s^2 v, but for the factor 1 - alpha
        focal = torch.linalg.vector_norm(twice, ord=1, dim=2).sum() * ((1 - alpha) / (2 * num_pixels))
        del v

        if ctx.needs_input_grad[0]:
            twice.lerp_(signed, s)  # w s^2 (s + 2 (1 - s) v)
            [d_focal] = torch.autograd.grad(large, small, twice, retain_graph=True)
            del twice, signed
            outside_M11, inside_M11 = (
                one_M[:, None, None] for one_M in (share_M / size_of_both_M, (share_M - 2) / size_of_both_M)
            )
            slope = torch.where(y, inside_M11, outside_M11)
            [d_dice] = torch.autograd.grad(large, small, torch.ops.aten.sigmoid_backward(slope, s))
            ctx.save_for_backward(d_focal, d_dice)
            ctx.focal_factor = (1 - alpha) / num_pixels
        return torch.stack([focal, dice])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sums: Tensor) -> tuple[Tensor | None, ...]:
        (d_focal, d_dice), (of_focal, of_dice) = ctx.saved_tensors, of_sums.unbind()
        of_focal = of_focal * ctx.focal_factor
        return torch.addcmul(d_focal * of_focal, d_dice, of_dice), None, None, None
