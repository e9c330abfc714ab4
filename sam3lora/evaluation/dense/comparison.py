"""Differences of dense models to the first of them on the same images, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sam3lora.errors import UserError
from sam3lora.evaluation.dense.measure import NUM_RESAMPLES, DenseMetrics
from sam3lora.evaluation.dense.saliency import MEASURES
from sam3lora.evaluation.metrics.bootstrap import Interval, bootstrap_difference, bootstrap_differences
from sam3lora.model.dense.settings import DenseSettings


def check_comparable(models: dict[str, DenseSettings]) -> None:
    """Raise UserError unless the models, by label, have the same mode and classes."""
    labels = list(models)
    for label in labels[1:]:
        first, other = models[labels[0]], models[label]
        if (first.mode, first.classes) != (other.mode, other.classes):
            raise UserError(
                f"expected models of the same mode and classes, got {first.mode} of {', '.join(first.classes)} "
                f"({labels[0]}) and {other.mode} of {', '.join(other.classes)} ({label})"
            )


def differences_to_first(
    first: DenseMetrics, others: Sequence[DenseMetrics], *, num_resamples: int = NUM_RESAMPLES
) -> dict[str, dict[str, Interval]]:
    """Each other model minus the first for all measures that have an interval, with paired 95 % intervals.

    Returns:
        Label -> name of the measure, or iou/CLASS -> difference.

    Raises:
        ValueError: The models were measured on different images.
    """
    differences = {}
    for other in others:
        if other.meter.image_ids != first.meter.image_ids:
            raise ValueError("expected models that were measured on the same images")
        found = bootstrap_differences(
            first.meter.label_metrics(), other.meter.label_metrics(), first.num_images, num_resamples=num_resamples
        )
        if first.meter.saliency is not None and other.meter.saliency is not None:
            rows, rows_of_other = first.meter.saliency.rows(), other.meter.saliency.rows()
            for name in MEASURES:
                found[name] = bootstrap_difference(
                    rows.metric(name), rows_of_other.metric(name), len(rows.image_ids), num_resamples=num_resamples
                )
        differences[other.label] = found
    return differences


def most_different(first: DenseMetrics, others: Sequence[DenseMetrics], count: int) -> list[int]:
    """Positions of the images on which the quality of the models differs most."""
    qualities_MI = np.nan_to_num(np.stack([one.meter.quality() for one in (first, *others)]), nan=1.0)
    spread_I = qualities_MI.max(axis=0) - qualities_MI.min(axis=0)
    return [int(row) for row in np.argsort(-spread_I, kind="stable")[:count] if spread_I[row] > 0]
