"""cgF1: units counted by hand, and every metric and count of SAM 3's own evaluator on the reference cases."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sam3lora.evaluation.metrics import cgf1, saco
from sam3lora.evaluation.metrics.cgf1 import Unit, UnitCounts, accumulate, choose_annotator, count_unit, iou_matrix

SHIPPED = Path(__file__).parents[1] / "reference"
REFERENCE = Path(os.environ.get("SAM3LORA_REFERENCE_DIR", SHIPPED))
CASES = sorted(REFERENCE.glob("cgf1_*_expected.json"))


def unit(iou_DT, scores_D) -> Unit:
    return Unit(np.array(iou_DT, dtype=float).reshape(len(scores_D), -1), np.array(scores_D, dtype=float))


def empty_unit(num_targets: int = 0) -> Unit:
    return Unit(np.zeros((0, num_targets)), np.zeros(0))


def differences(case: Path) -> list[str]:
    """What the package finds in a reference case otherwise than SAM 3's evaluator; all names of both sides count."""
    expected = json.loads(case.read_text())
    ground_truth_files = [case.parent / name for name in expected["gt"]]
    metrics, counts = {}, {}
    for iou_type in ("segm", "bbox"):
        result = saco.evaluate_saco(ground_truth_files, case.parent / expected["pred"], iou_type)
        metrics |= {f"cgF1_eval_{iou_type}_{name}": value for name, value in result.metrics().items()}
        counts[iou_type] = result.counts()
    wrong = [
        name
        for name in metrics.keys() | expected["metrics"].keys()
        if not abs(metrics.get(name, np.inf) - expected["metrics"].get(name, np.nan)) <= 1e-9
    ]
    return wrong + [f"{iou_type} counts" for iou_type in counts if counts[iou_type] != expected["counts"][iou_type]]


def test_reference_folder_has_cases():
    # without cases the next test would pass by comparing nothing
    assert CASES, (
        f"{REFERENCE} holds no cgf1_*_expected.json: set SAM3LORA_REFERENCE_DIR to a folder of reference cases"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removesuffix("_expected.json"))
def test_reference_case(case):
    assert differences(case) == []


def test_no_units_at_all():
    # nothing to count: zeros, and the reason why they say nothing
    result = accumulate([])
    assert result.counts()["units_evaluated"] == 0
    assert result.metrics()["cgF1"] == 0
    assert "object" in result.undefined_reason


def test_four_kinds_of_units():
    units = [empty_unit(), empty_unit(3), unit([], [0.9, 0.8]), unit([[0.76]], [0.9])]
    result = accumulate(count_unit(one) for one in units)
    counts = result.counts()
    assert [counts[name] for name in ("IL_TN", "IL_FN", "IL_FP", "IL_TP")] == [1, 1, 1, 1]
    # IoU 0.76 is right at six of ten thresholds; the false alarm's two detections are no positive false positives
    assert counts["TPs"] == [1] * 6 + [0] * 4
    assert counts["FNs"] == [3] * 6 + [4] * 4
    assert counts["FPs"] == [2] * 6 + [3] * 4
    assert counts["positive_micro_FPs"] == [0] * 6 + [1] * 4
    assert (result.num_positives, result.num_negatives, result.undefined_reason) == (2, 2, None)


def test_perfect_is_nearly_one_in_every_metric():
    metrics = accumulate([count_unit(unit(np.eye(2), [0.9, 0.9])), count_unit(empty_unit())]).metrics()
    assert metrics.pop("IL_FPR") == 0
    assert all(0.999 < value < 1 for value in metrics.values())


def test_false_alarms_lower_the_gate_and_not_the_positive_f1():
    positive, quiet = count_unit(unit([[1.0]], [0.9])), count_unit(empty_unit())
    before = accumulate([positive, quiet, quiet]).metrics()
    after = accumulate([positive, quiet, count_unit(unit([], [0.9] * 5))]).metrics()
    assert after["positive_micro_F1"] == before["positive_micro_F1"]
    # (1 x 1 - 1 x 0) / sqrt(2 x 1 x 2 x 1)
    assert after["IL_MCC"] == pytest.approx(0.5, abs=1e-5)
    assert after["cgF1"] == pytest.approx(0.5, abs=1e-3)
    assert after["precision"] == pytest.approx(1 / 6, abs=1e-4)


def test_without_negatives_cgf1_is_zero_and_says_why():
    result = accumulate([count_unit(unit([[1.0]], [0.9]))])
    assert result.metrics()["cgF1"] == 0
    assert result.metrics()["positive_micro_F1"] > 0.999
    assert "negatives" in result.undefined_reason


def test_macro_f1_is_minus_one_without_detected_positives():
    metrics = accumulate([count_unit(empty_unit(2)), count_unit(unit([], [0.9]))]).metrics()
    assert [metrics[f"positive_macro_F1{suffix}"] for suffix in ("", "@0.5", "@0.75")] == [-1, -1, -1]


def test_assignment_maximises_the_sum_of_ious():
    # taking the best pair (0.6) first would leave the other detection without a target
    counts = count_unit(unit([[0.6, 0.55], [0.55, 0.0]], [0.9, 0.8]))
    assert counts.true_positives_K.tolist() == [2, 2] + [0] * 8


def test_thresholds_include_their_value():
    counts = count_unit(unit([[0.5, 0.0], [0.0, 0.9]], [0.5, 0.4999]))
    assert (counts.num_targets, counts.num_detections) == (2, 1)
    assert counts.true_positives_K.tolist() == [1] + [0] * 9
    assert count_unit(unit([[0.5, 0.0], [0.0, 0.9]], [0.5, 0.4999]), 0.4).num_detections == 2


def test_oracle_rule():
    half, full, none = (UnitCounts(2, 2, np.full(10, right)) for right in (1, 2, 0))
    assert choose_annotator([half, full, none]) is full
    # the earlier one of equals
    assert choose_annotator([half, UnitCounts(2, 2, np.full(10, 1))]) is half
    # agreement that there is nothing beats everything; without targets but with detections it does not
    empty, false_alarm = UnitCounts(0, 0, np.zeros(10, int)), UnitCounts(0, 2, np.zeros(10, int))
    assert choose_annotator([UnitCounts(2, 0, np.zeros(10, int)), empty]) is empty
    assert choose_annotator([false_alarm, half]) is half


def test_iou_of_boxes_and_of_nothing():
    # [0, 0, 2, 2] and [1, 0, 2, 2] share 2 of 6; four boxes, too: pycocotools must not take them for something else
    assert iou_matrix([[0, 0, 2, 2]], [[1, 0, 2, 2], [5, 5, 1, 1]], "bbox").tolist() == [[pytest.approx(1 / 3), 0]]
    assert iou_matrix([[0, 0, 2, 2]] * 4, [[0, 0, 2, 2]] * 4, "bbox").tolist() == [[1.0] * 4] * 4
    assert iou_matrix([], [[0, 0, 1, 1]], "bbox").shape == (0, 1)
    assert iou_matrix([[0, 0, 1, 1]], [], "bbox").shape == (1, 0)


def test_counts_of_large_sets_do_not_overflow():
    # sums of NumPy integers, as weights on images give them: the product of four is beyond 64 bits
    tp, fp, tn, fn = (np.int64(n) for n in (30_000, 10_000, 350_000, 10_000))
    zeros = np.zeros(10)
    found = cgf1.CgF1(zeros, zeros, zeros, zeros, zeros, tp, fp, tn, fn).metrics()["IL_MCC"]
    margins = 40_000 * 40_000 * 360_000 * 360_000
    assert found == pytest.approx((30_000 * 350_000 - 10_000 * 10_000) / margins**0.5)
