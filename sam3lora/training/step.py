"""The loss of one batch and its gradients, computed in chunks of prompts that share one vision pass.

The loss is normalised by the counts of the whole optimizer step: all chunks, accumulated batches and workers. So the
gradient does not depend on how a step is divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
from torch import Tensor

from sam3lora.data.batch import Batch
from sam3lora.losses import Criterion, LossOutput, Normalizer, Predictions
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures
from sam3lora.training.features.encoder import ImageEncoder
from sam3lora.training.graphs.out_of_memory import again_without_graphs
from sam3lora.training.text_features import TextBank

_MASK_TERMS = ("loss_mask", "loss_dice", "loss_semantic_seg", "loss_semantic_dice")


@dataclass(frozen=True)
class StepCounts:
    """Divisors of a step's loss terms: find queries, boxes, queries with a semantic target, images, masks."""

    num_queries: float = 0
    num_boxes: float = 0
    num_semantic: float = 0
    num_images: float = 0
    num_masks: float = 0

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> StepCounts:
        return cls(
            sum(batch.num_queries for batch in batches),
            sum(len(batch.boxes_cxcywh_T4) for batch in batches),
            sum(batch.num_semantic for batch in batches),
            sum(batch.num_images for batch in batches),
            sum(int(batch.mask_valid_T.sum()) for batch in batches),
        )

    @classmethod
    def from_tensor(cls, values: Tensor) -> StepCounts:
        return cls(*values.tolist())

    def tensor(self) -> Tensor:
        return torch.tensor(astuple(self), dtype=torch.float64)

    def normalizer(self, world_size: int = 1) -> Normalizer:
        return Normalizer.from_counts(*astuple(self), world_size=world_size)

    def divisor_of(self, term: str) -> float:
        """The count that a term was divided by."""
        if term.startswith("dense_"):
            return self.num_images
        if term.startswith("click_"):
            return self.num_masks
        if term.startswith("loss_semantic"):
            return self.num_semantic
        if term.startswith(("loss_ce", "presence")):
            return self.num_queries
        return self.num_boxes


@dataclass
class TermSums:
    """Loss terms summed before division, and their counts, for means over any number of steps.

    ``loss`` is the weighted sum of the means, without the square root of the number of queries that scales gradients.
    So it is the same quantity for training and validation, whatever the batch size and the number of workers.
    """

    weights: Mapping[str, float]
    sums: dict[str, float] = field(default_factory=dict)
    counts: StepCounts = field(default_factory=StepCounts)

    def add(self, terms: dict[str, float], counts: StepCounts) -> None:
        """Add terms that were divided by ``counts``."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * max(counts.divisor_of(name), 1)
        self.counts = StepCounts.from_tensor(self.counts.tensor() + counts.tensor())

    def means(self) -> dict[str, float]:
        return {name: value / max(self.counts.divisor_of(name), 1) for name, value in self.sums.items()}

    def loss(self) -> float:
        return weighted_loss(self.means(), self.weights)


def weighted_loss(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(weights[name] * value for name, value in terms.items())


@dataclass
class LossRunner:
    """Computes the loss of batches, with or without gradients, in chunks of ``max_prompts`` find queries.

    A loss is NaN where the matcher meets a cost that is not finite.
    """

    staged: StagedSam3
    criterion: Criterion
    images: ImageEncoder
    text: TextBank
    device: torch.device
    bf16: bool = False
    max_prompts: int = 8
    one_to_many: bool = True

    @property
    def weights(self) -> Mapping[str, float]:
        return self.criterion.weights

    @property
    def term_names(self) -> list[str]:
        return [name for name in self.weights if self.one_to_many or not name.endswith("_o2m")]

    def forget_graphs(self) -> None:
        self.staged.forget_graphs()

    def give_up_graphs(self) -> bool:
        return self.staged.give_up_graphs()

    def has_loss(self, batch: Batch) -> bool:
        return batch.num_queries > 0

    def backward(self, batch: Batch, normalizer: Normalizer) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the batch to the parameters; return the detached total and the terms."""
        try:
            with self._adapters():
                return self._backward(batch, normalizer)
        except FloatingPointError:
            return torch.tensor(torch.nan, device=self.device), {}

    @torch.no_grad()
    def evaluate(self, batch: Batch, normalizer: Normalizer) -> dict[str, Tensor]:
        """The terms of the batch, the same ones as in training."""
        return again_without_graphs(self.staged, lambda: self._evaluate(batch, normalizer))

    def _evaluate(self, batch: Batch, normalizer: Normalizer) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        with self._autocast():
            vision = self.staged.prepare(self.images.of_batch(batch))
            text, text_index = self.text.features(batch.prompts_B)
        try:
            for rows in _chunks(batch.num_queries, self.max_prompts):
                add_terms(terms, self._loss(vision, text, text_index, batch, rows, normalizer).terms)
        except FloatingPointError:
            return dict.fromkeys(self.term_names, torch.tensor(torch.nan))
        return terms

    def _backward(self, batch: Batch, normalizer: Normalizer) -> tuple[Tensor, dict[str, Tensor]]:
        self.staged.begin_batch()
        with self._autocast():
            vision = self.staged.prepare(self.images.of_batch(batch))
            text, text_index = self.text.features(batch.prompts_B)
        chunks = _chunks(batch.num_queries, self.max_prompts)
        # Each chunk's backward pass ends at detached copies of the shared features, where the gradients of all chunks
        # add up. Then one backward pass goes through the encoders.
        shared = len(chunks) > 1
        vision_leaf, text_leaf = (vision.detached(), text.detached()) if shared else (vision, text)
        total = torch.zeros((), device=self.device)
        terms: dict[str, Tensor] = {}
        for rows in chunks:
            output = self._loss(vision_leaf, text_leaf, text_index, batch, rows, normalizer)
            if output.total.requires_grad:
                output.total.backward()
            total += output.total.detach()
            add_terms(terms, output.terms)
            del output  # its graph holds the unpacked masks, and the next chunk unpacks its own
        if shared:
            _backward_into(
                [
                    *zip(vision.tensors(), vision_leaf.tensors(), strict=True),
                    (text.embeds_PTC, text_leaf.embeds_PTC),
                ]
            )
        return total, terms

    def _loss(
        self,
        vision: VisionFeatures,
        text: TextFeatures,
        text_index: Tensor,
        batch: Batch,
        rows: slice,
        normalizer: Normalizer,
    ) -> LossOutput:
        """The loss of consecutive find queries of the batch."""
        weights = self.criterion.weights
        targets = batch.targets(self.device, rows)
        packed = batch.target_rows(rows)
        masked_K = np.unique(batch.query_T[packed][batch.mask_valid_T[packed]]) - rows.start
        wants_masks = len(masked_K) > 0 and any(weights[term] for term in _MASK_TERMS)
        image_index_B = torch.from_numpy(batch.query_image_B[rows]).to(self.device, non_blocking=True)
        with self._autocast():
            found = self.staged.detect(vision, text, image_index_B, text_index[rows], one_to_many=self.one_to_many)
        predictions = Predictions(
            logits_LBQ=found.logits_LBQ,
            boxes_cxcywh_LBQ4=found.boxes_cxcywh_LBQ4,
            presence_logits_LB=found.presence_to_learn_LB(),
            logits_o2m_LBQ=found.logits_o2m_LBQ,
            boxes_o2m_LBQ4=found.boxes_o2m_LBQ4,
        )
        pending = self.criterion.begin(predictions, targets)
        if wants_masks:  # the device makes masks while the host matches
            with self._autocast():
                head = self.staged.mask_head(found, torch.from_numpy(masked_K))
            predictions.mask_logits, predictions.semantic_logits = head.branch_logits, head.semantic_logits
        return self.criterion(predictions, targets, normalizer, pending)

    def _adapters(self) -> AbstractContextManager[None]:
        """Around forward and backward of a batch."""
        return self.staged.adapters_cast_once(torch.bfloat16) if self.bf16 else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _chunks(num_queries: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]


def add_terms(total: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    """Add terms to those of the same name, by one kernel."""
    names = list(terms)
    if names and names[0] in total:
        total |= zip(names, torch._foreach_add([total[name] for name in names], list(terms.values())), strict=True)
    else:
        total |= terms


def _backward_into(pairs) -> None:
    """Propagate the gradients on the detached copies into the encoders, in one pass."""
    pairs = [(made, leaf) for made, leaf in pairs if made.requires_grad and leaf.grad is not None]
    if pairs:
        torch.autograd.backward([made for made, _ in pairs], [leaf.grad for _, leaf in pairs])
