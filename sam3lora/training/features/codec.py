"""`FeatureForm`: the form in which the tokens of an image are cached, exact or in 8 bits.

Shapes: ``S`` tokens, ``C`` channels, ``G`` blocks of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64  # channels that share a scale


@dataclass(frozen=True)
class FeatureForm:
    """Converts tokens (S, C) to their cached form and back.

    ``int8`` keeps x as round(x / s) with s = max|x| / 127 over blocks of 64 channels of a token (over the whole token
    where 64 does not divide them). So a channel with much larger values, as ViTs have, makes only its own block coarse.
    A row is the C numbers and then the bytes of its G float32 scales, C + C / 16 bytes.
    """

    shape_SC: tuple[int, int]
    dtype: torch.dtype
    int8: bool = False

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.uint8 if self.int8 else self.dtype

    @property
    def kept_shape(self) -> tuple[int, int]:
        tokens, channels = self.shape_SC
        return (tokens, channels + 4 * self._num_blocks) if self.int8 else (tokens, channels)

    @property
    def num_bytes(self) -> int:
        """Bytes kept for an image."""
        rows, columns = self.kept_shape
        return rows * columns * self.kept_dtype.itemsize

    def pack(self, tokens_SC: Tensor) -> Tensor:
        """The cached form of tokens, on the CPU."""
        if not self.int8:
            return tokens_SC.to(self.dtype).cpu()
        blocks = tokens_SC.float().unflatten(1, (self._num_blocks, -1))
        scales_SG1 = blocks.abs().amax(2, keepdim=True) / 127
        values = (blocks / scales_SG1.where(scales_SG1 != 0, 1.0)).round().to(torch.int8)
        return torch.cat([values.flatten(1).view(torch.uint8), scales_SG1.squeeze(2).view(torch.uint8)], 1).cpu()

    def unpack(self, kept: Tensor, device: torch.device) -> Tensor:
        """Tokens (S, C) of the form's type on a device."""
        kept = kept.to(device, non_blocking=True)
        if not self.int8:
            return kept
        values = kept[:, : self.shape_SC[1]].view(torch.int8).unflatten(1, (self._num_blocks, -1))
        scales_SG = kept[:, self.shape_SC[1] :].contiguous().view(torch.float32)
        return values.float().mul_(scales_SG.unsqueeze(2)).flatten(1).to(self.dtype)

    def to_array(self, kept: Tensor) -> np.ndarray:
        """An array for a store. NumPy has no bfloat16, so its bits are stored as uint16."""
        return (kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy()

    def from_array(self, array: np.ndarray) -> Tensor | None:
        """The cached form from a stored array; None if its shape or type is wrong."""
        kept = torch.from_numpy(array)
        if kept.dtype == torch.uint16:
            kept = kept.view(torch.bfloat16)
        return kept if kept.dtype == self.kept_dtype and kept.shape == self.kept_shape else None

    @property
    def _num_blocks(self) -> int:
        channels = self.shape_SC[1]
        return channels // _BLOCK if channels % _BLOCK == 0 else 1
