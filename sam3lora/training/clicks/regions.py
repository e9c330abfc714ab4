"""Random pixels of regions, boxes of masks, and masks grown, shrunk or cut, for many objects at once.

Everything stays on the device of its tensors, and nothing is read back.

Shapes: `N` objects, `h` `w` pixels, `P` all of these.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(num: int, generator: torch.Generator) -> Tensor:
    """(num,) float64 in [0, 1) on the generator's device."""
    return torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)


def random_true(region_NP: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) index of one True of each row of a bool matrix, each equally likely; 0 in a row without any."""
    upto_NP = region_NP.cumsum(dim=1)
    count_N = upto_NP[:, -1]
    rank_N = (uniform(len(region_NP), generator) * count_N).long().clamp(max=count_N - 1)
    return torch.searchsorted(upto_NP, rank_N[:, None] + 1)[:, 0].clamp(max=region_NP.shape[1] - 1)


def boxes_of(masks_Nhw: Tensor) -> Tensor:
    """(N, 4) float32 xyxy around the pixels of each mask, in pixels of the mask; zeros for an empty one."""
    edges = []
    for along_NL in (masks_Nhw.any(dim=1), masks_Nhw.any(dim=2)):
        length = along_NL.shape[1]
        place_L = torch.arange(length, device=masks_Nhw.device)
        first_N = torch.where(along_NL, place_L, length).amin(dim=1)
        after_N = torch.where(along_NL, place_L + 1, 0).amax(dim=1)
        edges.append((torch.where(after_N > 0, first_N, 0), after_N))
    (x0_N, x1_N), (y0_N, y1_N) = edges
    return torch.stack([x0_N, y0_N, x1_N, y1_N], dim=1).float()


def grown(masks_Nhw: Tensor, radius_N: Tensor) -> Tensor:
    """Masks with all pixels at most `radius_N` steps away, diagonals included; radii go up to an eighth of the side."""
    current_N1hw = masks_Nhw[:, None].float()
    for step in range(max_radius(masks_Nhw)):
        wider_N1hw = F.max_pool2d(current_N1hw, 3, stride=1, padding=1)
        current_N1hw = torch.where((radius_N > step)[:, None, None, None], wider_N1hw, current_N1hw)
    return current_N1hw[:, 0] > 0


def shrunk(masks_Nhw: Tensor, radius_N: Tensor) -> Tensor:
    """Masks without the pixels at most `radius_N` steps away from the outside; the image's border is no outside."""
    return ~grown(~masks_Nhw, radius_N)


def max_radius(masks_Nhw: Tensor) -> int:
    """The radius up to which masks grow: an eighth of their longer side."""
    return max(1, max(masks_Nhw.shape[1:]) // 8)


def half_of(masks_Nhw: Tensor, generator: torch.Generator) -> Tensor:
    """The pixels of each mask on one side of a line through its centre of mass, in a random direction."""
    _, height, width = masks_Nhw.shape
    area_N = masks_Nhw.sum(dim=(1, 2)).clamp(min=1)
    y_h, x_w = (torch.arange(length, device=masks_Nhw.device) for length in (height, width))
    centre_x_N = (masks_Nhw.sum(dim=1) * x_w).sum(dim=1) / area_N
    centre_y_N = (masks_Nhw.sum(dim=2) * y_h).sum(dim=1) / area_N
    angle_N = 2 * math.pi * uniform(len(masks_Nhw), generator)
    along_x_Nw = angle_N.cos()[:, None] * (x_w - centre_x_N[:, None])
    along_y_Nh = angle_N.sin()[:, None] * (y_h - centre_y_N[:, None])
    return masks_Nhw & (along_x_Nw[:, None, :] + along_y_Nh[:, :, None] >= 0)
