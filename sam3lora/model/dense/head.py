"""The head of dense prediction: from tokens of the vision trunk to logits for every pixel of a map of side 4g.

Four maps, each from a layer norm and a 1x1 convolution of one layer's tokens, are resized to the sides g/2, g, 2g and
4g. From the coarsest on, blocks of few parameters merge them one after the other (a U-Net). It follows SAM3-UNet
(https://arxiv.org/abs/2512.01789), but for: skips are resized instead of cropped, each level may read another layer,
outputs at coarser levels help training, and groups instead of batches are normalised, so that an image's logits depend
on no other image, and a step on no division into batches and workers.

Shapes: `I` images, `S` tokens of a square image row by row, `C` channels of the trunk, `W` width of the head, `N`
channels of the output, `g` tokens a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["group", "batch"]
NUM_MAPS = 4  # of the sides 4g, 2g, g, g / 2
MAX_OUTPUTS = 3  # of the sides 4g, 2g, g


class DenseHead(nn.Module):
    """A light decoder over the tokens of one to four layers of the trunk.

    Args:
        channels: C of the trunk.
        num_outputs: N: 1 for a binary task, one more than the classes if they exclude each other, else the classes.
        width: W, a multiple of 32.
        num_layers: Layers whose tokens are given, 1 to 4, in their order. The finest map reads the first, the coarsest
            the last; the maps share them where there are fewer.
        num_levels: Levels with an output, 1 to 3.
        norm: `batch` normalises as the original does, with running statistics.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        num_outputs: int,
        *,
        width: int = 128,
        num_layers: int = 1,
        num_levels: int = MAX_OUTPUTS,
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        if width < 32 or width % 32:
            raise ValueError(f"expected a width that is a multiple of 32, got {width}")
        if num_outputs < 1 or not 1 <= num_layers <= NUM_MAPS or not 1 <= num_levels <= MAX_OUTPUTS:
            raise ValueError(
                f"expected an output, 1 to {NUM_MAPS} layers and 1 to {MAX_OUTPUTS} levels, "
                f"got {num_outputs}, {num_layers} and {num_levels}"
            )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(num_layers))
        self.reduce = nn.ModuleList(nn.Linear(channels, width) for _ in range(NUM_MAPS))
        self.blocks = nn.ModuleList(
            LightBlock(width if number == NUM_MAPS - 1 else 2 * width, width, norm) for number in range(NUM_MAPS)
        )
        self.outputs = nn.ModuleList(nn.Conv2d(width, num_outputs, 1) for _ in range(num_levels))

    def forward(self, tokens: Sequence[Tensor], num_levels: int = 1) -> list[Tensor]:
        """Logits (I, N, s, s) in float32 (float64 stays) of the sides s = 4g, 2g, g, the finest first.

        Args:
            tokens: (I, S, C) after each layer.
            num_levels: Levels to compute: the finest alone for predictions, all that there are in training.

        Raises:
            ValueError: There are other numbers of layers or levels than the head has, or the tokens make no square.
        """
        if len(tokens) != len(self.norms) or not 1 <= num_levels <= len(self.outputs):
            raise ValueError(
                f"expected {len(self.norms)} layers and at most {len(self.outputs)} levels, "
                f"got {len(tokens)} and {num_levels}"
            )
        side = math.isqrt(tokens[0].shape[1])
        if side < 2 or side**2 != tokens[0].shape[1]:
            raise ValueError(f"expected tokens of a square, got {tokens[0].shape[1]}")
        normed = [norm(one_ISC) for norm, one_ISC in zip(self.norms, tokens, strict=True)]
        merged: Tensor | None = None
        logits: list[Tensor] = []
        for level in reversed(range(NUM_MAPS)):
            tokens_ISW = self.reduce[level](normed[level * len(normed) // NUM_MAPS])
            skip = _resized(tokens_ISW.transpose(1, 2).unflatten(2, (side, side)), side * 4 >> level)
            merged = skip if merged is None else torch.cat([_resized(merged, skip.shape[-1]), skip], dim=1)
            merged = self.blocks[level](merged)
            if level < num_levels:
                logits.append(_at_least_float32(self.outputs[level](merged)))
        return logits[::-1]


class LightBlock(nn.Module):
    """From `channels` to `width` channels by 1x1 and depthwise 3x3 convolutions, each with norm and GELU.

    A quarter of the channels is split in two halves; the second goes through two depthwise convolutions one after the
    other. Both halves and both results make the block's last input.
    """

    def __init__(self, channels: int, width: int, norm: Norm = "group") -> None:
        super().__init__()
        half = channels // 8
        self.squeeze = _convolution(norm, channels, 2 * half)
        self.first = _convolution(norm, half, half, kernel_size=3, groups=half)
        self.second = _convolution(norm, half, half, kernel_size=3, groups=half)
        self.expand = _convolution(norm, 4 * half, width)

    def forward(self, maps: Tensor) -> Tensor:
        kept, read = self.squeeze(maps).chunk(2, dim=1)
        once = self.first(read)
        return self.expand(torch.cat([kept, read, once, self.second(once)], dim=1))


def _convolution(norm: Norm, channels: int, width: int, kernel_size: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, groups=groups)
    normalise = nn.GroupNorm(math.gcd(8, width), width) if norm == "group" else nn.BatchNorm2d(width)
    return nn.Sequential(convolution, normalise, nn.GELU())


def _resized(maps: Tensor, side: int) -> Tensor:
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
