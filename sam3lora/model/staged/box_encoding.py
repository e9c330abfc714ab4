"""What the DETR decoder derives from the boxes of its queries: position embeddings, and a bias of the attention.

Shapes: ``B`` find queries, ``Q`` object queries, ``S`` image tokens (``H`` rows by ``W`` columns), ``C`` channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class BoxEncoding:
    """Encodes boxes (B, Q, 4), cxcywh in [0, 1], as a ``Sam3DetrDecoder`` does; tables are made once for all layers."""

    def __init__(self, decoder: Any, references_BQ4: Tensor, size_hw: tuple[int, int]) -> None:
        self._decoder = decoder
        sine = decoder.position_encoding
        kind: Any = {"dtype": references_BQ4.dtype, "device": references_BQ4.device}
        exponents = torch.arange(0, sine.num_position_features, 2, **kind) / sine.num_position_features
        self._frequencies = sine.scale / sine.temperature**exponents
        # Places of columns and of rows (2, n, 1), the shorter row of them with places that are not used.
        self._size_hw = size_hw
        places_n = torch.arange(max(size_hw), **kind)
        places_2n = torch.stack([places_n / count * 8 for count in reversed(size_hw)])
        self._places_2n1 = places_2n.unsqueeze(-1)
        self._zero: Tensor | None = None

    def query_positions(self, boxes_BQ4: Tensor) -> Tensor:
        """Position embeddings (B, 1 + Q, C), zero for the presence token."""
        head = self._decoder.ref_point_head
        x, y, width, height = boxes_BQ4.split(1, dim=-1)
        angles_BQ4f = torch.cat([y, x, width, height], -1).unsqueeze(-1) * self._frequencies
        sine = torch.stack([angles_BQ4f.sin(), angles_BQ4f.cos()], -1).flatten(2)
        return F.pad(head(sine.to(head.layer1.weight.dtype)), (0, 0, 1, 0))

    def attention_bias(self, boxes_BQ4: Tensor) -> Tensor:
        """Attention bias (B, heads, 1 + Q, S) of each object query to each image token, zero for the presence token.

        It is the sum of a term for the token's row and one for its column. Both terms are small; the sum, the largest
        tensor of the decoder, is written once.
        """
        (height, width), (center, size) = self._size_hw, (boxes_BQ4 * 8).split(2, dim=-1)
        edges_BQ22 = torch.stack([torch.add(center, size, alpha=-0.5), torch.add(center, size, alpha=0.5)], -1)
        deltas_BQ2n2 = self._places_2n1 - edges_BQ22.unsqueeze(3)
        columns, rows = (deltas_BQ2n2.abs().log1p().copysign(deltas_BQ2n2) / math.log(8)).unbind(2)
        rows_BhQH = self._biases(self._decoder.box_rpb_embed_y, rows[:, :, :height])
        columns_BhQW = self._biases(self._decoder.box_rpb_embed_x, columns[:, :, :width])
        return (rows_BhQH.unsqueeze(-1) + columns_BhQW.unsqueeze(-2)).flatten(-2)

    def _biases(self, embed: Any, scaled_BQn2: Tensor) -> Tensor:
        """(B, heads, 1 + Q, n), in the order of the sum, which would otherwise be made in another one and copied."""
        biases_BhQn = embed(scaled_BQn2).permute(0, 3, 1, 2)
        if self._zero is None:
            self._zero = biases_BhQn.new_zeros(1)
        nothing = self._zero.expand(*biases_BhQn.shape[:2], 1, biases_BhQn.shape[3])
        return torch.cat([nothing, biases_BhQn], 2)
