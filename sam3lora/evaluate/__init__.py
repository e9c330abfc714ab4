"""Detections, mAP and the measurement of a split. `sam3lora.evaluate(...)` calls `evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3lora.evaluate.split import SplitMetrics

__all__ = ["evaluate"]


def evaluate(*args: Any, **kwargs: Any) -> SplitMetrics:
    """Measure an adapter, or a base model, on a COCO split: see `sam3lora.evaluate.run.evaluate`."""
    from sam3lora.evaluate.run import evaluate as run

    return run(*args, **kwargs)
