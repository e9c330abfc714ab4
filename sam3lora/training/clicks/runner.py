"""`ClickRunner`: the loss of a batch of images with masks, over simulated interactions, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam3lora.config.clicks import StartShares
from sam3lora.data.batch import Batch
from sam3lora.losses import Normalizer
from sam3lora.losses.clicks import ClickCriterion
from sam3lora.losses.focal_dice import resize
from sam3lora.model.clicks.head import ClickFeatures, ClickHead
from sam3lora.model.staged.trunk import first_layers
from sam3lora.training.clicks.asking import ask, best_masks
from sam3lora.training.clicks.objects import ClickTargets, click_targets, groups_of, joined
from sam3lora.training.features.encoder import EncodedImages
from sam3lora.training.step import add_terms
from sam3lora.training.task import WithoutGraphs


@dataclass
class ClickImages(EncodedImages[ClickFeatures]):
    """Computes what the mask decoder reads; the cache keeps the tokens after the whole trunk. Nothing of it learns."""

    head: ClickHead
    vision_trunk: Any

    @property
    def pixel_type(self) -> torch.dtype:
        return next(self.vision_trunk.parameters()).dtype

    @torch.no_grad()
    def tokens(self, pixel_values_ICHW: Tensor) -> Tensor:
        """Tokens (I, S, C) after all layers of the trunk."""
        return first_layers(self.vision_trunk, pixel_values_ICHW, len(self.vision_trunk.layers))

    def whole(self, pixel_values_ICHW: Tensor) -> ClickFeatures:
        return self.rest(self.tokens(pixel_values_ICHW))

    @torch.no_grad()
    def rest(self, tokens_ISC: Tensor) -> ClickFeatures:
        return self.head.embed(tokens_ISC)


@dataclass
class ClickRunner(WithoutGraphs):
    """A `Runner`. The terms are sums over objects and predictions, divided by the objects of the whole step.

    Attributes:
        iterations: Correcting clicks after the start, so that there are 1 + iterations predictions of an object.
        seed: Of the interactions in training; those of an evaluation have one of their own.
    """

    head: ClickHead
    criterion: ClickCriterion
    images: ClickImages
    device: torch.device
    starts: StartShares
    iterations: int = 3
    seed: int = 0
    bf16: bool = False
    max_prompts: int = 1

    @property
    def weights(self) -> Mapping[str, float]:
        return self.criterion.weights

    @property
    def term_names(self) -> list[str]:
        return list(self.criterion.weights)

    def has_loss(self, batch: Batch) -> bool:
        return bool(batch.mask_valid_T.any())

    def backward(self, batch: Batch, normalizer: Normalizer) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the batch to the parameters; return the detached total and the terms."""
        return self._run(batch, normalizer, self.seed)

    @torch.no_grad()
    def evaluate(self, batch: Batch, normalizer: Normalizer) -> dict[str, Tensor]:
        """The terms of the batch, the same ones as in training."""
        return self._run(batch, normalizer, seed=0)[1]

    def _run(self, batch: Batch, normalizer: Normalizer, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        with self._autocast():
            features = self.images.of_batch(batch)
        total, terms = torch.zeros((), device=self.device), dict[str, Tensor]()
        for group in groups_of(click_targets(batch, self.starts, seed, self.device)):
            total += self._interact(group, features, normalizer.num_masks, terms)
        return total, terms

    def _interact(
        self, group: Sequence[ClickTargets], features: ClickFeatures, num_objects: float, terms: dict[str, Tensor]
    ) -> Tensor:
        """Interactions that start in the same way; returns the detached loss, and adds to the terms."""
        sizes = [len(one.truth_Nhw) for one in group]
        image_N = torch.tensor([one.image for one in group]).repeat_interleave(torch.tensor(sizes)).to(self.device)
        truth_Nhw = torch.cat([one.truth_Nhw for one in group])
        rows, side = features.of_objects(image_N), self.head.input_side
        prompts = joined([one.first(side) for one in group])
        total = torch.zeros((), device=self.device)
        for left in reversed(range(1 + self.iterations)):
            with self._autocast():
                output = ask(self.head, rows, prompts)
            loss = self.criterion(output.logits_NMmm, output.iou_NM, output.object_N, truth_Nhw, num_objects)
            # Logits that are shown to the head again carry no gradient, so no prediction needs the graph of another.
            if loss.total.requires_grad:
                loss.total.backward()
            total += loss.total.detach()
            add_terms(terms, loss.terms)
            if left:
                logits_Nmm = best_masks(output)
                found_Nhw = resize(logits_Nmm, truth_Nhw.shape[1:]) > 0
                clicks = [
                    one.next_clicks(found, side) for one, found in zip(group, found_Nhw.split(sizes), strict=True)
                ]
                points, labels = (torch.cat(parts) for parts in zip(*clicks, strict=True))
                prompts = prompts.then(points, labels, logits_Nmm)
        return total

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)
