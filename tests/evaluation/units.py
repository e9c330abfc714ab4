"""Units of cgF1 drawn by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sam3lora.evaluation.metrics.cgf1 import Unit
from sam3lora.evaluation.metrics.cgf1_units import Units


def unit(ious: list[list[float]], scores: list[float]) -> Unit:
    """A unit with targets: the IoU of each detection with each, and the detections' scores."""
    return Unit(np.array(ious, float), np.array(scores, float))


def found(score: float, iou: float = 1.0) -> Unit:
    """One object, one detection."""
    return unit([[iou]], [score])


def false_alarm(*scores: float) -> Unit:
    """Detections and no object."""
    return Unit(np.zeros((len(scores), 0)), np.array(scores, float))


def made_units(units: Mapping[tuple[int, int], Unit], shape_IC: tuple[int, int]) -> Units:
    """(image, category) -> unit; every other pair cannot be judged."""
    positives = {pair: one for pair, one in units.items() if one.iou_DT.shape[1]}
    is_negative_IC = np.zeros(shape_IC, bool)
    alarms = []
    for pair in units.keys() - positives.keys():
        is_negative_IC[pair] = True
        alarms += [(pair, score) for score in units[pair].scores_D]
    return Units(
        list(positives.values()),
        np.array(list(positives), np.int32).reshape(-1, 2),
        np.array([pair for pair, _ in alarms], np.int32).reshape(-1, 2),
        np.array([score for _, score in alarms], float),
        is_negative_IC,
    )
