"""What one training worker does, from set-up to the last checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sam3lora.config import Config, load_config
from sam3lora.data.collate import Batch
from sam3lora.errors import RunFailed, UserError
from sam3lora.losses import Criterion, LossWeights, Normalizer
from sam3lora.model.adapter_folder import AdapterMetadata, save_adapter
from sam3lora.model.adapters import LoraSettings, apply_lora
from sam3lora.model.checkpointing import enable_checkpointing
from sam3lora.model.components import COMPONENTS
from sam3lora.model.forward import StagedSam3
from sam3lora.model.loading import load_base, tokenize
from sam3lora.train import distributed
from sam3lora.train.checkpoints import RunState, list_checkpoints, load_checkpoint, save_checkpoint
from sam3lora.train.datasets import BatchSource, RunData, load_run_data
from sam3lora.train.metrics import MetricsLog, WarningsToMetrics, memory_mb
from sam3lora.train.optimization import (
    build_optimizer,
    idle_adapters,
    learning_rate_factor,
    set_learning_rate,
    set_training_mode,
)
from sam3lora.train.step import LossRunner, StepCounts, TermSums, weighted_loss
from sam3lora.train.text import TextBank


class NonFiniteLoss(RunFailed):
    """A loss or gradient was NaN or infinite; the weights are those before the step."""


@dataclass
class Worker:
    """Everything a training worker holds between steps."""

    config: Config
    output_dir: Path
    device: torch.device
    model: nn.Module
    tokenizer: Any
    metadata: AdapterMetadata
    optimizer: torch.optim.AdamW
    runner: LossRunner
    data: RunData
    batches: BatchSource
    state: RunState
    log: MetricsLog | None
    report: Any = None
    total_steps: int = 0
    looked_for_idle: bool = False

    @property
    def rank(self) -> int:
        return distributed.rank()

    def __post_init__(self) -> None:
        epochs_left = self.config.training.num_epochs - self.state.epoch
        left = epochs_left * self.batches.steps_per_epoch - self.state.step_in_epoch
        total = self.state.step + left
        self.total_steps = min(total, self.config.training.max_steps or total)


def run_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """The function that each worker of a run executes; ``payload`` holds ``config`` (a dict) and ``use_ray``.

    Returns the steps done, the best loss and its step. A worker that starts again goes on from the last checkpoint.
    """
    config = load_config(payload["config"])
    worker = set_up(config, Path(config.output.output_dir), use_ray=payload["use_ray"])
    train_epochs(worker)
    return finish(worker)


def set_up(config: Config, output_dir: Path, *, use_ray: bool) -> Worker:
    """Load data and model, add the adapter, and restore the last checkpoint if there is one."""
    training = config.training
    warnings = WarningsToMetrics() if use_ray else None
    device = _device(config, use_ray)
    base = load_base(
        config.model.name,
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=device,
        attention=config.model.attention,
        local_files_only=config.model.local_files_only,
        resolution=config.model.resolution,
    )
    data = load_run_data(config, base.resolution)
    torch.manual_seed(training.seed)
    lora = LoraSettings.from_mapping(config.lora.model_dump())
    model = apply_lora(base.model, lora, geometry_cls=config.model.geometry_cls)
    sam3 = model.get_base_model()
    checkpointed = training.gradient_checkpointing
    components = COMPONENTS if checkpointed is True else tuple(checkpointed or ())
    enable_checkpointing(sam3, components)
    staged = StagedSam3(sam3, geometry_cls=config.model.geometry_cls, checkpointing=components)
    text = TextBank(
        staged,
        lambda prompts: tokenize(base.tokenizer, prompts),
        trainable=config.lora.apply_to_text_encoder,
        device=device,
    )
    text.add(data.prompts)
    text.release_tower()
    runner = LossRunner(
        staged=staged,
        criterion=_criterion(config),
        text=text,
        device=device,
        bf16=training.mixed_precision == "bf16",
        max_prompts=training.max_prompts_per_forward,
        one_to_many=training.one_to_many,
        vision_trainable=config.lora.apply_to_vision_encoder,
    )
    optimizer = build_optimizer(
        model,
        learning_rate=training.learning_rate,
        component_learning_rates=training.component_learning_rates,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
    )
    state = RunState()
    saved = list_checkpoints(output_dir / "checkpoints")
    if saved:
        state = load_checkpoint(saved[-1], model, optimizer, settings_of(config))
    batches = BatchSource(data, config, use_ray=use_ray)
    # With other workers or batches a step takes another number of images: go on at the same place in the epoch.
    state.step_in_epoch = state.step_in_epoch * state.images_per_step // batches.images_per_step
    state.images_per_step = batches.images_per_step
    log = None
    if distributed.rank() == 0:
        log = MetricsLog(output_dir, after_step=state.step, tensorboard=config.logging.tensorboard)
        log.write(
            "start",
            step=state.step,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            device=str(device),
            num_workers=distributed.world_size(),
            steps_per_epoch=batches.steps_per_epoch,
            **data.summary(),
        )
        if warnings:
            warnings.write_to(log)
    metadata = AdapterMetadata(
        base_model=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        prompts=list(data.prompts),
        resolution=base.resolution,
        geometry_cls=config.model.geometry_cls,
        thresholds=_thresholds(config),
        data=data.summary(),
        lora=lora.to_dict(),
    )
    report = _ray_report() if use_ray else None
    return Worker(
        config=config,
        output_dir=output_dir,
        device=device,
        model=model,
        tokenizer=base.tokenizer,
        metadata=metadata,
        optimizer=optimizer,
        runner=runner,
        data=data,
        batches=batches,
        state=state,
        log=log,
        report=report,
    )


def train_epochs(worker: Worker) -> None:
    """Steps, with validation and checkpoints where they are due, until the last epoch, ``max_steps`` or a stop."""
    state, training = worker.state, worker.config.training
    stream = worker.batches.training_batches(state.epoch, state.step_in_epoch)
    sums = TermSums(worker.runner.criterion.weights, dict(state.epoch_sums), StepCounts(*state.epoch_counts))
    clock = _Clock()
    while not state.finished and state.step < worker.total_steps:
        group = list(islice(stream, training.gradient_accumulation_steps))
        assert group, "the plan of a run has a batch for every step"
        # A group never mixes epochs: the plan gives every epoch a whole number of groups.
        waited = clock.lap()
        terms, counts, grad_norm = optimizer_step(worker, group)
        sums.add(terms, counts)
        state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
        _log_step(worker, group, terms, grad_norm, clock.lap(), waited)
        epoch_ends = state.step_in_epoch == worker.batches.steps_per_epoch
        last = state.step == worker.total_steps
        if epoch_ends or last or _due(state.step, training.eval_steps):
            validate(worker, sums, epoch_ends=epoch_ends, forced=last)
            clock.lap()
        if epoch_ends:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            sums = TermSums(worker.runner.criterion.weights)
        state.epoch_sums, state.epoch_counts = dict(sums.sums), sums.counts.tensor().tolist()
        due = _due(state.step, training.save_steps) if training.save_steps else epoch_ends
        if due or last or state.finished:
            save(worker)
            clock.lap()


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
        _report_idle(worker)
    set_learning_rate(worker.optimizer, _factor(worker, state.step))
    worker.optimizer.step()
    worker.optimizer.zero_grad(set_to_none=True)
    # Means over workers of parts divided by (count / workers) add up to the terms of the whole step.
    return dict(zip(terms, values[1:-1], strict=True)), counts, values[-1]


def validate(worker: Worker, sums: TermSums, *, epoch_ends: bool, forced: bool) -> None:
    """Training means of the epoch so far, the validation loss with the same terms, the best adapter, early stopping."""
    state, training = worker.state, worker.config.training
    if training.eval_steps and not forced and not _due(state.step, training.eval_steps):
        _write_epoch(worker, sums, None, {})
        return
    valid = validation_terms(worker)
    metrics = {}
    every = worker.config.evaluation.every_epochs
    if valid is not None and every and epoch_ends and (state.epoch + 1) % every == 0:
        metrics = _validation_metrics(worker)
    loss = valid.loss() if valid is not None else sums.loss()
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"validation loss is not finite after step {state.step}. The last checkpoint is intact. "
            "Try a lower training.learning_rate, or mixed_precision: no"
        )
    improved = state.best_loss is None or loss < state.best_loss
    if improved:
        state.best_loss, state.best_step, state.evaluations_without_improvement = loss, state.step, 0
    else:
        state.evaluations_without_improvement += 1
    _write_epoch(worker, sums, valid, metrics)
    if improved and worker.rank == 0:
        _save_adapter(worker, "best", {"valid_loss" if valid is not None else "train_loss": loss, **metrics})
    patience = training.early_stopping_patience
    if patience and state.evaluations_without_improvement >= patience:
        state.finished = True
        if worker.log:
            worker.log.write("early_stop", step=state.step, best_step=state.best_step, best_loss=state.best_loss)
    if worker.report:
        names = {"valid_loss" if valid is not None else "train_loss": loss}
        worker.report({"step": state.step, "epoch": state.epoch, **names, **metrics})


def validation_terms(worker: Worker) -> TermSums | None:
    """The loss terms over the validation split, None without one. The adapter's dropout is off."""
    if worker.data.valid is None:
        return None
    worker.model.eval()
    sums, skipped = TermSums(worker.runner.criterion.weights), []
    for batch in worker.batches.validation_batches():
        skipped += batch.skipped
        if batch.num_queries:
            counts = StepCounts.of([batch])
            terms = _evaluate(worker.runner, batch, counts.normalizer())
            sums.add({name: value.item() for name, value in terms.items()}, counts)
    merged = TermSums(sums.weights)
    for other_sums, other_counts, others_skipped in distributed.gather_objects((sums.sums, sums.counts, skipped)):
        for name, value in other_sums.items():
            merged.sums[name] = merged.sums.get(name, 0.0) + value
        merged.counts = StepCounts.from_tensor(merged.counts.tensor() + other_counts.tensor())
        _log_skipped(worker, others_skipped)
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
    if worker.log:
        worker.log.write("end", step=worker.state.step, best_step=worker.state.best_step)
    return {"step": worker.state.step, "best_loss": worker.state.best_loss, "best_step": worker.state.best_step}


# ---- details ---------------------------------------------------------------------------------------------------------


def settings_of(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _device(config: Config, use_ray: bool) -> torch.device:
    if use_ray:
        import ray
        from ray.train.torch import get_device

        device = get_device()
        # Of the CPUs that the worker reserved some are its data tasks'.
        own = ray.get_runtime_context().get_assigned_resources().get("CPU", 1) - config.training.num_workers
        torch.set_num_threads(max(1, min(int(own), torch.get_num_threads())))
    else:
        wanted = config.scaling.use_gpu
        if wanted is True and not torch.cuda.is_available():
            raise UserError("scaling.use_gpu is true, but torch finds no GPU here: set it to auto or false")
        device = torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")
    return device


def _ray_report():
    from ray import train

    return train.report


def _criterion(config: Config) -> Criterion:
    loss = config.training.loss
    names = ("bbox", "giou", "ce", "presence", "mask", "dice", "semantic", "semantic_dice", "o2m")
    return Criterion(
        LossWeights(**{name: getattr(loss, name) for name in names}),
        pos_weight=loss.pos_weight,
        mask_points=loss.num_points if loss.mask_resolution == "points" else None,
        touch_unused=False,  # gradients are averaged by hand: unused parameters hold nobody up
    )


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _thresholds(config: Config) -> dict[str, float]:
    """What inference with this adapter uses unless it is told otherwise."""
    evaluation = config.evaluation
    return {
        "detection_threshold": evaluation.prob_threshold,
        "nms_iou": evaluation.nms_iou,
        "merge": evaluation.merge,
        "merge_iou": evaluation.merge_iou,
        "max_detections": evaluation.max_detections,
    }


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def _factor(worker: Worker, step: int) -> float:
    training = worker.config.training
    return learning_rate_factor(
        training.lr_scheduler, step, total_steps=worker.total_steps, warmup_steps=training.warmup_steps
    )


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


def _backward(runner: LossRunner, batch: Batch, normalizer: Normalizer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As ``runner.backward``; a matching that found no finite cost is a loss that is not finite."""
    try:
        return runner.backward(batch, normalizer)
    except FloatingPointError:
        return torch.tensor(torch.nan, device=runner.device), {}


def _evaluate(runner: LossRunner, batch: Batch, normalizer: Normalizer) -> dict[str, torch.Tensor]:
    try:
        return runner.evaluate(batch, normalizer)
    except FloatingPointError:
        return dict.fromkeys(_term_names(runner), torch.tensor(torch.nan))


def _report_idle(worker: Worker) -> None:
    idle = idle_adapters(worker.model)
    if idle and worker.log:
        worker.log.write(
            "warning",
            message=f"{len(idle)} adapted modules got no gradient in the first step with objects and may never learn: "
            + ", ".join(idle[:8])
            + (" ..." if len(idle) > 8 else ""),
            modules=idle,
        )


def _log_step(
    worker: Worker, group: list[Batch], terms: dict[str, float], grad_norm: float, seconds: float, waited: float
) -> None:
    state = worker.state
    skipped = [item for batch in group for item in batch.skipped]
    for others in distributed.gather_objects(skipped) if worker.config.training.on_bad_image == "skip" else ():
        _log_skipped(worker, others)
    if not worker.log or not (_due(state.step, worker.config.training.logging_steps) or state.step == 1):
        return
    images = sum(batch.num_images for batch in group) * distributed.world_size()
    worker.log.write(
        "step",
        step=state.step,
        total_steps=worker.total_steps,
        epoch=state.epoch + 1,
        loss=weighted_loss(terms, worker.runner.criterion.weights),
        terms=terms,
        lr=worker.optimizer.param_groups[0]["lr"],
        grad_norm=grad_norm,
        images_per_second=images / max(seconds + waited, 1e-9),
        data_wait_share=waited / max(seconds + waited, 1e-9),
        memory_mb=memory_mb(worker.device),
    )


def _log_skipped(worker: Worker, skipped: list[tuple[int, str, str]]) -> None:
    for image_id, path, reason in skipped if worker.log else ():
        worker.log.write("skipped_image", step=worker.state.step, image_id=image_id, path=path, reason=reason)


def _write_epoch(worker: Worker, sums: TermSums, valid: TermSums | None, metrics: dict[str, Any]) -> None:
    if not worker.log:
        return
    worker.log.write(
        "epoch",
        step=worker.state.step,
        total_steps=worker.total_steps,
        epoch=worker.state.epoch + 1,
        train_loss=sums.loss(),
        valid_loss=valid.loss() if valid is not None else None,
        train_terms=sums.means(),
        valid_terms=valid.means() if valid is not None else {},
        lr=worker.optimizer.param_groups[0]["lr"],
        memory_mb=memory_mb(worker.device),
        **metrics,
    )


def _save_adapter(worker: Worker, name: str, metrics: dict[str, Any]) -> None:
    state = worker.state
    epoch = state.epoch + (state.step_in_epoch > 0)  # begun or finished
    worker.metadata.metrics = {"step": state.step, "epoch": epoch, **metrics}
    save_adapter(worker.model, worker.output_dir / name, worker.metadata)


def _validation_metrics(worker: Worker) -> dict[str, Any]:
    from sam3lora.train.validation_metrics import validation_metrics

    return validation_metrics(worker)


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
