"""What one training worker does, from set-up to the last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from sam3lora.config import Config, load_config
from sam3lora.data.batch import Batch
from sam3lora.engine.device import is_out_of_memory
from sam3lora.errors import OutOfMemory
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.training import distributed
from sam3lora.training.checkpoints import RunState, save_checkpoint
from sam3lora.training.reporting import Clock, is_due, log_skipped, log_step, vision_counts, write_epoch
from sam3lora.training.setup import Worker, set_up, settings_of
from sam3lora.training.step import StepCounts, TermSums
from sam3lora.training.update import NonFiniteLoss, evaluate_batch, optimizer_step


def run_worker(payload: dict[str, Any], *, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """The function that each worker of a run executes; ``payload`` holds ``config`` (a dict) and ``use_ray``.

    Returns the steps done, the best loss and its step. A worker that starts again goes on from the last checkpoint.
    ``report`` gets what is measured after each validation; on Ray it goes to Ray Train.
    """
    config = load_config(payload["config"])
    try:
        worker = set_up(config, Path(config.output.output_dir), use_ray=payload["use_ray"])
        worker.report = worker.report or report
        train_epochs(worker)
        return finish(worker)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_too_large(config, error)) from error


def _too_large(config: Config, error: BaseException) -> str:
    training = config.training
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    smaller = "half the batch_size and twice the gradient_accumulation_steps (the same step)"
    if training.batch_size == "auto":
        smaller = "a number in place of batch_size: auto, which takes what fits when the run starts"
    return (
        f"out of memory with training.batch_size={training.batch_size} and training.max_prompts_per_forward="
        f"{training.max_prompts_per_forward}: {first_line}. Try {smaller}, fewer prompts per forward, "
        "gradient_checkpointing: true, or model.dtype: bfloat16"
    )


def train_epochs(worker: Worker) -> None:
    """Steps, with validation and checkpoints where they are due, until the last epoch, ``max_steps`` or a stop."""
    # Closed whatever happens: the thread that reads ahead is not to outlive the run.
    with closing(worker.batches.training_batches(worker.state.epoch, worker.state.step_in_epoch)) as stream:
        _train_on(worker, stream)


def _train_on(worker: Worker, stream: Iterator[Batch]) -> None:
    state, training = worker.state, worker.config.training
    sums = TermSums(worker.runner.criterion.weights, dict(state.epoch_sums), StepCounts(*state.epoch_counts))
    if state.step == 0 and worker.config.evaluation.base_loss:
        measure_base(worker)
    clock = Clock()
    while not state.finished and state.step < worker.total_steps:
        group = list(islice(stream, training.gradient_accumulation_steps))
        assert group, "the plan of a run has a batch for every step"
        # A group never mixes epochs: the plan gives every epoch a whole number of groups.
        waited = clock.lap()
        terms, counts, grad_norm = optimizer_step(worker, group)
        sums.add(terms, counts)
        state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
        log_step(worker, group, terms, grad_norm, clock.lap(), waited)
        epoch_ends = state.step_in_epoch == worker.batches.steps_per_epoch
        last = state.step == worker.total_steps
        if epoch_ends or last or is_due(state.step, training.eval_steps):
            validate(worker, sums, epoch_ends=epoch_ends, forced=last)
            clock.lap()
        if epoch_ends:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            sums = TermSums(worker.runner.criterion.weights)
        state.epoch_sums, state.epoch_counts = dict(sums.sums), sums.counts.tensor().tolist()
        due = is_due(state.step, training.save_steps) if training.save_steps else epoch_ends
        if due or last or state.finished:
            save(worker)
            clock.lap()


def validate(worker: Worker, sums: TermSums, *, epoch_ends: bool, forced: bool) -> None:
    """Training means of the epoch so far, the validation loss with the same terms, the best adapter, early stopping."""
    state, training = worker.state, worker.config.training
    if training.eval_steps and not forced and not is_due(state.step, training.eval_steps):
        write_epoch(worker, sums, None, {})
        return
    valid = validation_terms(worker)
    metrics = {}
    every = worker.config.evaluation.every_epochs
    if valid is not None and every and (forced or (epoch_ends and (state.epoch + 1) % every == 0)):
        metrics = _validation_metrics(worker)
    loss = valid.loss() if valid is not None else sums.loss()
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"validation loss is not finite after step {state.step}. The last checkpoint is intact. "
            "Try a lower training.learning_rate, or mixed_precision: no"
        )
    best_metric = worker.config.evaluation.chosen_best_metric if valid is not None else "valid_loss"
    improved = _improved(state, loss, metrics, best_metric)
    write_epoch(worker, sums, valid, metrics)
    if improved and worker.rank == 0:
        _save_adapter(worker, "best", {"valid_loss" if valid is not None else "train_loss": loss, **metrics})
    patience = training.early_stopping_patience
    if patience and state.evaluations_without_improvement >= patience:
        state.finished = True
        if worker.log:
            worker.log.write("early_stop", step=state.step, best_step=state.best_step, best_loss=state.best_loss)
    if worker.report:
        names = {"valid_loss" if valid is not None else "train_loss": loss}
        worker.report({"step": state.step, "epoch": state.epoch + 1, **names, **metrics})


def _improved(state: RunState, loss: float, metrics: dict[str, Any], best_metric: str) -> bool:
    """Whether this is the best adapter so far, noted in ``state``: by a metric where it is measured, or by loss.

    The two can disagree: the classification term is small for a model that finds nothing, and grows when it begins to.
    """
    if best_metric == "valid_loss":
        better = state.best_loss is None or loss < state.best_loss
    else:
        value = metrics.get(best_metric)
        if value is None:
            return False
        better = state.best_metric_value is None or value > state.best_metric_value
    if better:
        state.best_loss, state.best_step = loss, state.step
        state.best_metric_value = metrics.get(best_metric)
    state.evaluations_without_improvement = 0 if better else state.evaluations_without_improvement + 1
    return better


def measure_base(worker: Worker) -> None:
    """The validation loss before the first step, which is the base model's: what the adapter has to beat."""
    valid = validation_terms(worker)
    if worker.log and valid is not None:
        worker.log.write("base", step=0, valid_loss=valid.loss(), valid_terms=valid.means())


def validation_terms(worker: Worker) -> TermSums | None:
    """The loss terms over the validation split, None without one. The adapter's dropout is off."""
    if worker.data.valid is None:
        return None
    worker.model.eval()
    sums, skipped = TermSums(worker.runner.criterion.weights), []
    with closing(worker.batches.validation_batches()) as batches:
        for batch in batches:
            skipped += batch.skipped
            if batch.num_queries:
                counts = StepCounts.of([batch])
                terms = evaluate_batch(worker.runner, batch, counts.normalizer())
                sums.add({name: value.item() for name, value in terms.items()}, counts)
    merged = TermSums(sums.weights)
    for other_sums, other_counts, others_skipped in distributed.gather_objects((sums.sums, sums.counts, skipped)):
        for name, value in other_sums.items():
            merged.sums[name] = merged.sums.get(name, 0.0) + value
        merged.counts = StepCounts.from_tensor(merged.counts.tensor() + other_counts.tensor())
        log_skipped(worker, others_skipped)
    return merged


def save(worker: Worker) -> None:
    """A checkpoint and the ``last`` adapter, by the first worker."""
    if worker.rank != 0:
        return
    root, keep = worker.output_dir / "checkpoints", worker.config.training.save_total_limit
    save_checkpoint(root, worker.model, worker.optimizer, worker.state, settings_of(worker.config), keep=keep)
    _save_adapter(worker, "last", {})


def finish(worker: Worker) -> dict[str, Any]:
    worker.state.finished = True
    counts = vision_counts(worker)
    if worker.log:
        worker.log.write("end", step=worker.state.step, best_step=worker.state.best_step, **counts)
    return {"step": worker.state.step, "best_loss": worker.state.best_loss, "best_step": worker.state.best_step}


def _save_adapter(worker: Worker, name: str, metrics: dict[str, Any]) -> None:
    state = worker.state
    epoch = state.epoch + (state.step_in_epoch > 0)  # begun or finished
    worker.metadata.metrics = {"step": state.step, "epoch": epoch, **metrics}
    save_adapter(worker.model, worker.output_dir / name, worker.metadata)


def _validation_metrics(worker: Worker) -> dict[str, Any]:
    from sam3lora.training.validator import validation_metrics

    return validation_metrics(worker)
