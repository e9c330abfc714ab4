"""One update of the adapter; it stops before a loss that is not finite damages the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sam3lora.data.batch import Batch
from sam3lora.errors import RunFailed
from sam3lora.training import distributed
from sam3lora.training.graphs.out_of_memory import again_without_graphs
from sam3lora.training.optimization import learning_rate_factor, set_learning_rate, set_training_mode
from sam3lora.training.reporting import report_idle
from sam3lora.training.step import StepCounts, add_terms

if TYPE_CHECKING:
    from sam3lora.training.trainer import Trainer


class NonFiniteLoss(RunFailed):
    """A loss or gradient was NaN or infinite; the weights are those before the step."""


def optimizer_step(trainer: Trainer, group: list[Batch]) -> tuple[dict[str, float], StepCounts, float]:
    """One update of the adapter from the batches of all workers, of which `group` are this worker's.

    Returns loss terms and counts of all workers, and the norm of the gradient before clipping.

    Raises:
        NonFiniteLoss: on all workers alike.
    """
    state, training, runner = trainer.state, trainer.config.training, trainer.runner
    counts = StepCounts.from_tensor(distributed.sum_over_workers(StepCounts.of(group).tensor()))
    normalizer = counts.normalizer(distributed.world_size())
    set_training_mode(trainer.model, model_dropout=training.model_dropout)
    seeds = np.random.SeedSequence([training.seed, state.step, distributed.rank()])
    dropout_seed = int(seeds.generate_state(1, np.uint64)[0] >> 1)
    zero = torch.zeros((), device=trainer.device)

    def compute_gradients() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        trainer.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(dropout_seed)
        totals, terms = [], dict.fromkeys(runner.term_names, zero)
        for batch in group:
            if runner.has_loss(batch):
                total, batch_terms = runner.backward(batch, normalizer)
                totals.append(total)
                add_terms(terms, batch_terms)
        return totals, terms

    totals, terms = again_without_graphs(runner, compute_gradients)
    # Gradients, terms and "not finite" travel together: one exchange and one wait for the device in each step.
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    finite = torch.stack([zero, *totals]).isfinite().all().float()
    stats = torch.nan_to_num(torch.stack([1 - finite, *terms.values()]).float(), nan=0.0, posinf=0.0, neginf=0.0)
    flags = torch.tensor(trainer.notices.flags()).to(stats, non_blocking=True)
    stats = distributed.average_gradients(parameters, torch.cat([stats, flags]))
    grad_norm = nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
    values = torch.cat([stats, grad_norm.detach().reshape(1).to(stats)]).tolist()
    if values[0] > 0 or not math.isfinite(values[-1]):
        _raise_non_finite(state.step, group, [batch for batch in group if runner.has_loss(batch)], totals)
    if not trainer.looked_for_idle and counts.num_boxes:  # without objects, boxes and masks get no gradient
        trainer.looked_for_idle = True
        report_idle(trainer)
    factor = learning_rate_factor(
        training.lr_scheduler, state.step, total_steps=trainer.total_steps, warmup_steps=state.warmup_steps or 0
    )
    set_learning_rate(trainer.optimizer, factor)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    # Each worker divided its terms by (count / workers), so their mean over workers is the term of the whole step.
    trainer.notices.agree(values[1 + len(terms) : -1])
    return dict(zip(terms, values[1 : 1 + len(terms)], strict=True)), counts, values[-1]


def _raise_non_finite(step: int, group: list[Batch], learned_from: list[Batch], totals: list[torch.Tensor]) -> None:
    """Called on all workers; each of them names the images of all."""
    bad = [
        f"images {batch.image_ids.tolist()}"
        + (f" with prompts {prompts}" if (prompts := sorted(set(batch.prompts_B))) else "")
        for batch, total in zip(learned_from, totals, strict=True)
        if not torch.isfinite(total)
    ]
    images = [number for batch in group for number in batch.image_ids.tolist()]
    shares = distributed.gather_objects((bad, images))
    bad = [item for share, _ in shares for item in share]
    images = [number for _, share in shares for number in share]
    where = "; ".join(bad) or f"the gradient of images {images}"
    raise NonFiniteLoss(
        f"loss is not finite at step {step + 1}: {where}. The weights were not changed by this step; the "
        "last checkpoint is intact. Try a lower training.learning_rate, mixed_precision: no, or look at these images"
    )
