"""The loss of one batch and its gradients, in chunks of prompts that share one vision pass.

The counts that normalise the loss are those of the whole optimizer step: all chunks, accumulated batches and workers.
So the gradient does not depend on how a step is divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam3lora.data.collate import Batch
from sam3lora.losses import Criterion, LossWeights, Normalizer, Predictions, Targets, count_semantic
from sam3lora.model.forward import StagedSam3, TextFeatures, VisionFeatures
from sam3lora.train.features import ImageEncoder
from sam3lora.train.text import TextBank


@dataclass(frozen=True)
class StepCounts:
    """What the loss terms of a step are divided by: find queries, target boxes, queries with a semantic target."""

    num_queries: float = 0
    num_boxes: float = 0
    num_semantic: float = 0

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> StepCounts:
        targets = [batch.targets() for batch in batches if batch.num_queries]
        return cls(
            sum(len(t.num_B) for t in targets),
            sum(len(t.boxes_cxcywh_T4) for t in targets),
            sum(count_semantic(t) for t in targets),
        )

    @classmethod
    def from_tensor(cls, values: Tensor) -> StepCounts:
        return cls(*values.tolist())

    def tensor(self) -> Tensor:
        return torch.tensor([self.num_queries, self.num_boxes, self.num_semantic], dtype=torch.float64)

    def normalizer(self, world_size: int = 1) -> Normalizer:
        return Normalizer.from_counts(self.num_queries, self.num_boxes, self.num_semantic, world_size)

    def divisor_of(self, term: str) -> float:
        """The count that a term was divided by."""
        if term.startswith("loss_semantic"):
            return self.num_semantic
        if term.startswith(("loss_ce", "presence")):
            return self.num_queries
        return self.num_boxes


@dataclass
class TermSums:
    """Loss terms summed before division, and their counts: means over any number of steps.

    ``loss`` is the weighted sum of the means, without the square root of the batch size that scales gradients; so
    it is the same quantity for training and validation, whatever the batch size and the number of workers.
    """

    weights: LossWeights
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


def weighted_loss(terms: dict[str, float], weights: LossWeights) -> float:
    factors = weights.by_term()
    return sum(factors[name] * value for name, value in terms.items())


@dataclass
class LossRunner:
    """Computes the loss of batches with or without gradients.

    Args:
        staged: the model.
        criterion: the loss.
        images: features of the images.
        text: features of the prompts.
        device: of the model.
        bf16: run the forward under bfloat16 autocast.
        max_prompts: find queries at a time.
        one_to_many: include the one-to-many branch.
    """

    staged: StagedSam3
    criterion: Criterion
    images: ImageEncoder
    text: TextBank
    device: torch.device
    bf16: bool = False
    max_prompts: int = 8
    one_to_many: bool = True

    def backward(self, batch: Batch, normalizer: Normalizer) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the batch to the parameters; return the detached total and the terms."""
        with self._autocast():
            vision = self.images.of_batch(batch)
            text, text_index = self.text.features(batch.prompts_B)
        chunks = list(_chunks(batch, self.max_prompts))
        shared = len(chunks) > 1
        vision_leaf, text_leaf = (vision.detached(), text.detached()) if shared else (vision, text)
        total = torch.zeros((), device=self.device)
        terms: dict[str, Tensor] = {}
        for rows, targets in chunks:
            output = self._loss(batch, vision_leaf, text_leaf, text_index, rows, targets, normalizer)
            if output.total.requires_grad:
                output.total.backward()
            total += output.total.detach()
            _add_terms(terms, output.terms)
        if shared:
            _backward_into(zip(vision.maps_ICHW, vision_leaf.maps_ICHW, strict=True))
            _backward_into([(text.embeds_PTC, text_leaf.embeds_PTC)])
        return total, terms

    @torch.no_grad()
    def evaluate(self, batch: Batch, normalizer: Normalizer) -> dict[str, Tensor]:
        """The terms of the batch, the same ones as in training."""
        terms: dict[str, Tensor] = {}
        with self._autocast():
            vision = self.images.of_batch(batch)
            text, text_index = self.text.features(batch.prompts_B)
        for rows, targets in _chunks(batch, self.max_prompts):
            _add_terms(terms, self._loss(batch, vision, text, text_index, rows, targets, normalizer).terms)
        return terms

    def _loss(
        self,
        batch: Batch,
        vision: VisionFeatures,
        text: TextFeatures,
        text_index: Tensor,
        rows: slice,
        targets: Targets,
        normalizer: Normalizer,
    ):
        weights = self.criterion.weights
        masked = torch.unique(targets.query_index()[targets.mask_valid_T])
        wants_masks = len(masked) > 0 and any((weights.mask, weights.dice, weights.semantic, weights.semantic_dice))
        with self._autocast():
            found = self.staged.detect(
                vision,
                text,
                batch.query_image_B[rows].to(self.device),
                text_index[rows],
                one_to_many=self.one_to_many,
            )
            head = self.staged.mask_head(found, masked.to(self.device)) if wants_masks else None
        predictions = Predictions(
            logits_LBQ=found.logits_LBQ,
            boxes_cxcywh_LBQ4=found.boxes_cxcywh_LBQ4,
            presence_logits_LB=found.presence_logits_LB,
            logits_o2m_LBQ=found.logits_o2m_LBQ,
            boxes_o2m_LBQ4=found.boxes_o2m_LBQ4,
            mask_logits=head.branch_logits if head else None,
            semantic_logits=head.semantic_logits if head else None,
        )
        return self.criterion(predictions, targets.to(self.device), normalizer)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _chunks(batch: Batch, size: int) -> Iterator[tuple[slice, Targets]]:
    """Runs of at most ``size`` find queries with their packed targets."""
    targets = batch.targets()
    ends = torch.cat([torch.zeros(1, dtype=torch.long), targets.num_B.cumsum(0)]).tolist()
    for start in range(0, batch.num_queries, size):
        rows = slice(start, min(start + size, batch.num_queries))
        packed = slice(ends[rows.start], ends[rows.stop])
        masks = None if targets.masks_THW is None else targets.masks_THW[packed]
        yield (
            rows,
            Targets(targets.num_B[rows], targets.boxes_cxcywh_T4[packed], masks, targets.mask_valid_T[packed]),
        )


def _add_terms(total: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    for name, value in terms.items():
        total[name] = total[name] + value if name in total else value


def _backward_into(pairs) -> None:
    """Send the gradients that the chunks left on shared leaves into the encoder that made them, in one pass."""
    pairs = [(made, leaf) for made, leaf in pairs if made.requires_grad and leaf.grad is not None]
    if pairs:
        torch.autograd.backward([made for made, _ in pairs], [leaf.grad for _, leaf in pairs])
