"""One update of the adapter, and what stops it before it damages the weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from sam3lora.data.batch import Batch
from sam3lora.errors import RunFailed
from sam3lora.losses import Normalizer
from sam3lora.training import distributed
from sam3lora.training.optimization import learning_rate_factor, set_learning_rate, set_training_mode
from sam3lora.training.reporting import report_idle
from sam3lora.training.setup import Worker
from sam3lora.training.step import LossRunner, StepCounts


class NonFiniteLoss(RunFailed):
    """A loss or gradient was NaN or infinite; the weights are those before the step."""


def optimizer_step(worker: Worker, group: list[Batch]) -> tuple[dict[str, float], StepCounts, float]:
    """One update of the adapter from a group of batches of every worker; the terms are those of all workers."""
    state, training, runner = worker.state, worker.config.training, worker.runner
    workers = distributed.world_size()
    counts = StepCounts.from_tensor(distributed.sum_over_workers(StepCounts.of(group).tensor()))
    normalizer = counts.normalizer(workers)
    set_training_mode(worker.model, model_dropout=training.model_dropout)
    torch.manual_seed(_dropout_seed(training.seed, state.step, worker.rank))
    totals, terms = [], dict.fromkeys(_term_names(runner), torch.zeros((), device=worker.device))
    for batch in group:
        if batch.num_queries:
            total, batch_terms = _backward(runner, batch, normalizer)
            totals.append(total)
            for name, value in batch_terms.items():
                terms[name] = terms[name] + value
    parameters = [p for p in worker.model.parameters() if p.requires_grad]
    zero = torch.zeros((), device=worker.device)
    finite = torch.stack([zero, *totals]).isfinite().all().float()
    stats = torch.stack([1 - finite, *terms.values()])
    stats = distributed.average_gradients(parameters, torch.nan_to_num(stats.float(), nan=0.0, posinf=0.0, neginf=0.0))
    grad_norm = nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
    values = torch.cat([stats, grad_norm.detach().reshape(1).to(stats)]).tolist()
    if values[0] > 0 or not math.isfinite(values[-1]):
        _raise_non_finite(worker, group, totals)
    if not worker.looked_for_idle and counts.num_boxes:  # a step without objects has no gradient for boxes and masks
        worker.looked_for_idle = True
        report_idle(worker)
    set_learning_rate(worker.optimizer, _factor(worker, state.step))
    worker.optimizer.step()
    worker.optimizer.zero_grad(set_to_none=True)
    # Means over workers of parts divided by (count / workers) add up to the terms of the whole step.
    return dict(zip(terms, values[1:-1], strict=True)), counts, values[-1]


def _backward(runner: LossRunner, batch: Batch, normalizer: Normalizer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As ``runner.backward``; a matching that found no finite cost is a loss that is not finite."""
    try:
        return runner.backward(batch, normalizer)
    except FloatingPointError:
        return torch.tensor(torch.nan, device=runner.device), {}


def evaluate_batch(runner: LossRunner, batch: Batch, normalizer: Normalizer) -> dict[str, torch.Tensor]:
    try:
        return runner.evaluate(batch, normalizer)
    except FloatingPointError:
        return dict.fromkeys(_term_names(runner), torch.tensor(torch.nan))


def _raise_non_finite(worker: Worker, group: list[Batch], totals: list[torch.Tensor]) -> None:
    """Called on all workers alike; every one of them names the images, whoever had them."""
    bad = [
        f"images {batch.image_ids.tolist()} with prompts {sorted(set(batch.prompts_B))}"
        for batch, total in zip([b for b in group if b.num_queries], totals, strict=True)
        if not torch.isfinite(total)
    ]
    images = [number for batch in group for number in batch.image_ids.tolist()]
    shares = distributed.gather_objects((bad, images))
    bad = [item for share, _ in shares for item in share]
    images = [number for _, share in shares for number in share]
    where = "; ".join(bad) or f"the gradient of images {images}"
    raise NonFiniteLoss(
        f"loss is not finite at step {worker.state.step + 1}: {where}. The weights were not changed by this step; the "
        "last checkpoint is intact. Try a lower training.learning_rate, mixed_precision: no, or look at these images"
    )


def _term_names(runner: LossRunner) -> list[str]:
    return [name for name in runner.criterion.weights.by_term() if runner.one_to_many or not name.endswith("_o2m")]


def _factor(worker: Worker, step: int) -> float:
    training = worker.config.training
    return learning_rate_factor(
        training.lr_scheduler, step, total_steps=worker.total_steps, warmup_steps=training.warmup_steps
    )


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
