"""Differences of adapters to their base on the same images, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sam3lora.evaluation.metrics.bootstrap import Interval, Metric, bootstrap_difference, map_difference
from sam3lora.evaluation.metrics.cgf1 import CgF1
from sam3lora.evaluation.metrics.cgf1_units import count_units
from sam3lora.evaluation.metrics.measure import SplitMetrics
from sam3lora.evaluation.split_matches import ABSENT

NOTICEABLE = 0.01
"""Smallest difference in mAP or cgF1 that reports count as one, however certain it is."""


def differences_to_base(
    base: SplitMetrics, adapters: Sequence[SplitMetrics], *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Adapter minus base for mAP, cgF1 and false alarms, with paired 95 % bootstrap intervals.

    All are measured on the same split with the same settings.

    Returns:
        Adapter label -> "map", "cgf1", "off_prompt_fpr" (where both models have it) -> difference.

    Raises:
        ValueError: The models were measured on different images or categories.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    differences = {}
    for adapter in adapters:
        of_adapter = {"map": map_difference(base.matches.table, adapter.matches.table, **options)}
        for name, make in (("cgf1", _cgf1_metric), ("off_prompt_fpr", _false_alarm_metric)):
            if getattr(base, name) is not None and getattr(adapter, name) is not None:
                of_adapter[name] = bootstrap_difference(make(base), make(adapter), base.num_images, **options)
        differences[adapter.label] = of_adapter
    return differences


def _cgf1_metric(metrics: SplitMetrics) -> Metric:
    """cgF1 as a function of image weights, from counts summed once for each image."""
    sums = count_units(metrics.matches.complete_units).sums(axis=0)

    def measure(image_weights_I: np.ndarray) -> float | None:
        weighted = CgF1(**{name: image_weights_I @ values for name, values in sums.items()})
        return None if weighted.undefined_reason else weighted.metrics()["cgF1"]

    return measure


def _false_alarm_metric(metrics: SplitMetrics) -> Metric:
    absent_I = (metrics.matches.shown_IC == ABSENT).sum(axis=1)
    alarms_I = metrics.is_alarm_IC.sum(axis=1)

    def measure(image_weights_I: np.ndarray) -> float | None:
        num_absent = image_weights_I @ absent_I
        return float(image_weights_I @ alarms_I / num_absent) if num_absent else None

    return measure
