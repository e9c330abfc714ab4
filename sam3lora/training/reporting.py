"""The lines that a training worker writes to the run's metrics."""

from __future__ import annotations

import time
from typing import Any

from sam3lora.data.batch import Batch
from sam3lora.training import distributed
from sam3lora.training.metrics_log import memory_mb
from sam3lora.training.optimization import idle_adapters
from sam3lora.training.setup import Worker
from sam3lora.training.step import TermSums, weighted_loss


def log_step(
    worker: Worker, group: list[Batch], terms: dict[str, float], grad_norm: float, seconds: float, waited: float
) -> None:
    state = worker.state
    skipped = [item for batch in group for item in batch.skipped]
    for others in distributed.gather_objects(skipped) if worker.config.training.on_bad_image == "skip" else ():
        log_skipped(worker, others)
    if not worker.log or not (is_due(state.step, worker.config.training.logging_steps) or state.step == 1):
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


def log_skipped(worker: Worker, skipped: list[tuple[int, str, str]]) -> None:
    if not worker.log:
        return
    for image_id, path, reason in skipped:
        worker.log.write("skipped_image", step=worker.state.step, image_id=image_id, path=path, reason=reason)


def vision_counts(worker: Worker) -> dict[str, int]:
    """Images through the vision trunk, and images whose trunk output was kept: of all workers since they started."""
    images = worker.runner.images
    shares = distributed.gather_objects((images.vision_passes, images.features_loaded))
    passes, loaded = (sum(share) for share in zip(*shares, strict=True))
    return {"vision_passes": passes, "features_loaded": loaded}


def write_epoch(worker: Worker, sums: TermSums, valid: TermSums | None, metrics: dict[str, Any]) -> None:
    counts = vision_counts(worker)
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
        **counts,
        **metrics,
    )


def report_idle(worker: Worker) -> None:
    idle = idle_adapters(worker.model)
    if idle and worker.log:
        worker.log.write(
            "warning",
            message=f"{len(idle)} adapted modules got no gradient in the first step with objects and may never learn: "
            + ", ".join(idle[:8])
            + (" ..." if len(idle) > 8 else ""),
            modules=idle,
        )


class Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def is_due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is due after ``step``; never with None."""
    return every is not None and step % every == 0
