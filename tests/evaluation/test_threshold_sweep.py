"""The threshold sweep: curves from units drawn by hand, and which threshold it offers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sam3lora.evaluation.metrics.cgf1 import accumulate, count_unit
from sam3lora.evaluation.metrics.curves import THRESHOLDS, sweep_thresholds

from .units import false_alarm, found, made_units, unit


def sweep_of(units: dict, thresholds=THRESHOLDS):
    """Images and categories count from 1."""
    moved = {(image - 1, category - 1): one for (image, category), one in units.items()}
    shape_IC = tuple(np.max([*units, (0, 0)], axis=0))
    return sweep_thresholds(made_units(moved, shape_IC), range(1, shape_IC[1] + 1), thresholds)


def test_no_units():
    sweep = sweep_of({})
    assert (sweep.best_threshold, sweep.best_cgf1, sweep.per_category) == (None, None, {})
    assert "object" in sweep.reason
    assert sweep.thresholds == list(THRESHOLDS)


def test_best_threshold_lies_between_false_alarms_and_objects():
    # objects are found at 0.3 and above, false alarms end at 0.2
    sweep = sweep_of({(1, 1): found(0.3), (2, 1): found(0.9), (3, 1): false_alarm(0.2)}, [0.1, 0.25, 0.5])
    assert sweep.best_threshold == 0.25
    assert sweep.best_cgf1 == sweep.cgf1[1] > 0.999
    assert sweep.reason is None
    assert sweep.cgf1[0] == 0  # a detection everywhere: the gate tells nothing
    assert sweep.recall == pytest.approx([1, 1, 0.5], abs=1e-3)
    assert sweep.precision == pytest.approx([2 / 3, 1, 1], abs=1e-3)
    assert sweep.positive_micro_f1 == pytest.approx([1, 1, 2 / 3], abs=1e-3)
    assert sweep.il_mcc == pytest.approx([0, 1, 0.5], abs=1e-3)


def test_of_equal_thresholds_the_nearest_to_one_half():
    # everything from 0.25 to 0.70 is perfect; of 0.3 and 0.7, as near as each other, the lower
    units = {(1, 1): found(0.7), (2, 1): false_alarm(0.2)}
    assert sweep_of(units).best_threshold == 0.5
    assert sweep_of(units, [0.3, 0.7]).best_threshold == 0.3
    assert sweep_of({(1, 1): found(0.4), (2, 1): false_alarm(0.2)}).best_threshold == 0.4
    assert sweep_of({(1, 1): found(0.9), (2, 1): false_alarm(0.7)}).best_threshold == 0.75


def test_without_cgf1_positive_micro_f1_chooses():
    # no negatives; the second detection of the unit is wrong, and gone above 0.6
    sweep = sweep_of({(1, 1): unit([[1.0], [0.0]], [0.9, 0.6])})
    assert (sweep.best_threshold, sweep.best_cgf1) == (0.65, None)
    assert "negatives" in sweep.reason
    # as sure of the false alarm as of the object: IL_MCC is 0 at every threshold
    sweep = sweep_of({(1, 1): found(0.6), (2, 1): false_alarm(0.6)})
    assert (sweep.best_threshold, sweep.best_cgf1) == (0.5, None)
    assert "not above 0" in sweep.reason


def test_without_positives_or_hits_nothing_is_offered():
    sweep = sweep_of({(1, 1): false_alarm(0.9)})
    assert (sweep.best_threshold, sweep.best_cgf1) == (None, None)
    assert "object" in sweep.reason
    missed = sweep_of({(1, 1): found(0.9, iou=0.1), (2, 1): false_alarm(0.2)})
    assert (missed.best_threshold, missed.best_cgf1) == (None, None)
    assert "not above 0" in missed.reason


def test_categories_have_their_own_best():
    units = {(1, 1): found(0.3), (2, 1): false_alarm(0.2), (1, 2): found(0.9), (2, 2): false_alarm(0.8)}
    sweep = sweep_of(units)
    written = json.loads(json.dumps(sweep.to_dict()))["per_category"]
    assert {id_: curve["best_threshold"] for id_, curve in written.items()} == {"1": 0.3, "2": 0.85}
    for position, threshold in enumerate(THRESHOLDS):
        counts = {pair: count_unit(one, threshold) for pair, one in units.items()}
        assert sweep.cgf1[position] == accumulate(counts.values()).metrics()["cgF1"]
        for id_, curve in sweep.per_category.items():
            of_category = accumulate(entry for (_, category), entry in counts.items() if category == id_)
            assert curve.cgf1[position] == of_category.metrics()["cgF1"]


def test_thresholds_below_the_floor_are_refused():
    with pytest.raises(ValueError, match=r"at least 0\.05, got 0\.01"):
        sweep_of({(1, 1): found(0.3)}, [0.01, 0.5])
