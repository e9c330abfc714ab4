"""The mask head: mask logits of chosen object queries, from the output of the detector.

Shapes: ``B`` find queries, ``K`` of them with masks, ``Q`` object queries, ``M`` selected (find query, object query)
pairs, ``C`` channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Sam3Model

from sam3lora.model.staged.stage_outputs import DetectorOutput


class MaskHead:
    """Instance and semantic mask logits of chosen object queries, 4 x 4 to a patch (288 x 288 for 1008 pixels).

    Indices of find queries and object queries are best on the CPU: then the host does not wait for the device.
    """

    def __init__(self, model: Sam3Model, detections: DetectorOutput, rows_K: Tensor, pixels_KCHW: Tensor) -> None:
        self._decoder = model.mask_decoder
        self._detections = detections
        self._rows_K = rows_K
        self._pixels_KCHW = pixels_KCHW
        self._instance_KCHW: Tensor | None = None
        self._queries_KQC: dict[str, Tensor] = {}
        # The loss calls this object outside of the forward's autocast block: keep the forward's precision.
        device = pixels_KCHW.device.type
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        self._position_B = torch.full((len(detections.image_index_B),), -1)
        self._position_B[rows_K] = torch.arange(len(rows_K))

    def prepare(self, branch: str = "o2o") -> None:
        """Run the layers of instance masks for every object query of ``rows_K``.

        `instance_logits` then computes matrix products only, without a weight of the model.
        """
        with torch.autocast(**self._autocast):
            self._instance_KCHW = self._decoder.instance_projection(self._pixels_KCHW)
            hidden_KQC = self._detections.hidden_BQC[branch][self._on_device(self._rows_K)]
            self._queries_KQC[branch] = self._decoder.mask_embedder(hidden_KQC)

    def instance_logits(self, b_index_M: Tensor, q_index_M: Tensor, branch: str = "o2o") -> Tensor:
        """Mask logits (M, h, w) of the pairs (find query, object query); ``b_index_M`` must be among ``rows_K``."""
        b_index_M, q_index_M = b_index_M.cpu(), q_index_M.cpu()
        with torch.autocast(**self._autocast):
            if self._instance_KCHW is None:
                self._instance_KCHW = self._decoder.instance_projection(self._pixels_KCHW)
            height, width = self._pixels_KCHW.shape[-2:]
            position_M = self._position_B[b_index_M]
            order = position_M.argsort(stable=True)
            if branch in self._queries_KQC:
                index = self._on_device(torch.stack([position_M, q_index_M])[:, order])
                queries_MC = self._queries_KQC[branch][index[0], index[1]]
            else:
                index = self._on_device(torch.stack([b_index_M, q_index_M])[:, order])
                queries_MC = self._decoder.mask_embedder(self._detections.hidden_BQC[branch][index[0], index[1]])
            # Pairs are sorted by find query for one matrix product each: to gather pixel embeddings (M, C, h, w) would
            # take M x 85 MB at 1008 pixels.
            counts = torch.bincount(position_M, minlength=len(self._pixels_KCHW)).tolist()
            products = [
                queries @ pixels.flatten(1)
                for queries, pixels in zip(queries_MC.split(counts), self._instance_KCHW, strict=True)
                if len(queries)
            ]
            if not products:
                return queries_MC.new_zeros(0, height, width)
            logits = products[0] if len(products) == 1 else torch.cat(products)
            if not torch.equal(order, torch.arange(len(order))):
                logits = logits.index_select(0, self._on_device(order.argsort()))
            return logits.view(-1, height, width)

    def branch_logits(self, branch: str, b_index_M: Tensor, q_index_M: Tensor) -> Tensor:
        """``instance_logits`` with the arguments in the loss's order."""
        return self.instance_logits(b_index_M, q_index_M, branch)

    def semantic_logits(self, b_index_K: Tensor) -> Tensor:
        """Semantic logits (K, h, w) of the given find queries: whether a pixel belongs to the prompt."""
        with torch.autocast(**self._autocast):
            position = self._position_B[b_index_K.cpu()]
            pixels = self._pixels_KCHW
            if not torch.equal(position, torch.arange(len(pixels))):
                pixels = pixels[self._on_device(position)]
            return self._decoder.semantic_projection(pixels).squeeze(1)

    def _on_device(self, index: Tensor) -> Tensor:
        return index.to(self._pixels_KCHW.device, non_blocking=True)
