"""The lines that a training worker writes into the metrics of its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sam3lora.config.training import images_per_step
from sam3lora.data.bad_images import SkippedImage
from sam3lora.training import distributed
from sam3lora.training.metrics_log import memory_mb
from sam3lora.training.optimization import idle_adapters
from sam3lora.training.step import TermSums, weighted_loss

if TYPE_CHECKING:
    from sam3lora.training.trainer import Trainer


FEW_STEPS, ENOUGH_STEPS = 200, 500


def log_plan(trainer: Trainer, best_metric: str, reason: str | None) -> None:
    """What a user should know of the plan of a run before its first step."""
    training, batches, workers = trainer.config.training, trainer.batches, distributed.world_size()
    lines: list[tuple[str, str]] = []
    if reason:
        lines.append(("warning", f"best/ is chosen by {best_metric}: {reason}"))
    images, now = batches.images_per_step, images_per_step(training, workers)
    if now != images:
        message = f"a step takes {images} images, as when the run began, and not the {now} that batch_size and "
        message += f"gradient_accumulation_steps make now: to take these, set training.images_per_step={now}"
        lines.append(("warning", message))
    elif training.images_per_step is None and workers > 1:
        message = f"a step takes {images} images; with another number of workers it would take more or fewer. To fix "
        lines.append(("note", f"{message}it for every run, set training.images_per_step={images}"))
    steps, warmup = trainer.total_steps, training.warmup_steps
    if warmup is not None and warmup > steps // 2:
        lines.append(("note", f"training.warmup_steps={warmup} is cut to half of the {steps} steps of the run"))
    if steps < FEW_STEPS and training.max_steps is None:
        epochs = -(-ENOUGH_STEPS // batches.steps_per_epoch)
        message = f"{steps} steps in all, where recipes of this kind take some hundreds: training.num_epochs={epochs} "
        lines.append(("note", f"{message}takes {epochs * batches.steps_per_epoch}"))
    assert trainer.log
    for kind, text in lines:
        trainer.log.write(kind, step=trainer.state.step, message=text)


def log_step(trainer: Trainer, terms: dict[str, float], grad_norm: float, seconds: float, waited: float) -> None:
    """The line of a step, if one is due.

    Before its `seconds`, the step waited for its batches for `waited` seconds.
    """
    state, training = trainer.state, trainer.config.training
    if not trainer.log or (state.step > 1 and state.step % training.logging_steps):
        return
    trainer.log.write(
        "step",
        step=state.step,
        total_steps=trainer.total_steps,
        epoch=state.epoch + 1,
        loss=weighted_loss(terms, trainer.runner.weights),
        terms=terms,
        lr=trainer.optimizer.param_groups[0]["lr"],
        grad_norm=grad_norm,
        images_per_second=trainer.batches.images_per_step / max(seconds + waited, 1e-9),
        data_wait_share=waited / max(seconds + waited, 1e-9),
        memory_mb=memory_mb(trainer.device),
    )


def log_skipped(trainer: Trainer, skipped: Sequence[SkippedImage]) -> None:
    """A line for each bad image."""
    if trainer.log:
        for image_id, path, reason in skipped:
            trainer.log.write("skipped_image", step=trainer.state.step, image_id=image_id, path=path, reason=reason)


def log_epoch(trainer: Trainer, sums: TermSums, valid: TermSums | None, metrics: dict[str, Any]) -> None:
    """The training means of the epoch so far, and what was measured on the validation split."""
    counts = vision_counts(trainer)
    if not trainer.log:
        return
    trainer.log.write(
        "epoch",
        step=trainer.state.step,
        total_steps=trainer.total_steps,
        epoch=trainer.state.epoch + 1,
        train_loss=sums.loss(),
        valid_loss=valid.loss() if valid is not None else None,
        train_terms=sums.means(),
        valid_terms=valid.means() if valid is not None else {},
        lr=trainer.optimizer.param_groups[0]["lr"],
        memory_mb=memory_mb(trainer.device),
        **counts,
        **metrics,
    )


def vision_counts(trainer: Trainer) -> dict[str, int]:
    """Images through the vision trunk, and images whose kept trunk output was used, of all workers since the start."""
    images = trainer.runner.images
    shares = distributed.gather_objects((images.vision_passes, images.features_loaded))
    passes, loaded = (sum(share) for share in zip(*shares, strict=True))
    return {"vision_passes": passes, "features_loaded": loaded}


def report_idle(trainer: Trainer) -> None:
    """A warning that names the adapted modules without a gradient."""
    idle = idle_adapters(trainer.model)
    if idle and trainer.log:
        trainer.log.write(
            "warning",
            message=f"{len(idle)} adapted modules got no gradient in the first step with objects and may never learn: "
            + ", ".join(idle[:8])
            + (" ..." if len(idle) > 8 else ""),
            modules=idle,
        )
