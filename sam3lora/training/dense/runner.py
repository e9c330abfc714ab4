"""`DenseRunner`: the loss of a batch of images with label maps, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sam3lora.data.batch import Batch
from sam3lora.losses import Normalizer
from sam3lora.losses.dense import DenseCriterion, DenseLossOutput
from sam3lora.model.dense.model import DenseSam3
from sam3lora.training.features.encoder import EncodedImages
from sam3lora.training.task import WithoutGraphs


@dataclass
class DenseImages(EncodedImages[list[Tensor]]):
    """Computes the outputs (I, S, C) of the layers that the head reads."""

    model: DenseSam3

    @property
    def pixel_type(self) -> torch.dtype:
        return next(self.model.trunk.parameters()).dtype

    def whole(self, pixel_values_ICHW: Tensor) -> list[Tensor]:
        return self.model.encode(pixel_values_ICHW)

    def rest(self, tokens_ISC: Tensor) -> list[Tensor]:
        return self.model.encode_rest(tokens_ISC)


@dataclass
class DenseRunner(WithoutGraphs):
    """A `Runner`. The terms are sums over images, divided by the images of the whole step."""

    model: DenseSam3
    criterion: DenseCriterion
    images: DenseImages
    device: torch.device
    bf16: bool = False
    max_prompts: int = 1

    @property
    def weights(self) -> Mapping[str, float]:
        """The terms are weighted already, by level."""
        return dict.fromkeys(self.criterion.term_names, 1.0)

    @property
    def term_names(self) -> list[str]:
        return list(self.criterion.term_names)

    def has_loss(self, batch: Batch) -> bool:
        return batch.num_images > 0

    def backward(self, batch: Batch, normalizer: Normalizer) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the batch to the parameters; return the detached total and the terms."""
        loss = self._loss(batch, normalizer)
        loss.total.backward()
        return loss.total.detach(), loss.terms

    @torch.no_grad()
    def evaluate(self, batch: Batch, normalizer: Normalizer) -> dict[str, Tensor]:
        """The terms of the batch, the same ones as in training."""
        return self._loss(batch, normalizer).terms

    def _loss(self, batch: Batch, normalizer: Normalizer) -> DenseLossOutput:
        assert batch.label_maps is not None, "a dense run decodes label maps"
        labels_INMM = torch.from_numpy(batch.label_maps).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.model.logits(self.images.of_batch(batch), len(self.criterion.level_weights))
        labels = labels_INMM if self.criterion.mode == "multilabel" else labels_INMM[:, 0]
        return self.criterion(logits, labels, normalizer.num_images)
