"""Chart data: points and counts worked out by hand, and means that agree with mAP."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from sam3lora.evaluation.metrics.curves import evaluation_curves

from .splits import map_of, rle


def counts(**bins) -> list[int]:
    """`_3=2`: two scores in bin 3 of 20."""
    return [bins.get(f"_{number}", 0) for number in range(20)]


def test_nothing_at_all():
    found = evaluation_curves(map_of([], [], 0, names=()))
    assert (found.precision_recall_50.mean, found.precision_recall_50.per_category) == (None, {})
    assert (found.detection_scores.right, found.best_scores.wrong) == (counts(), counts())


def test_precision_over_recall():
    # two objects; right, wrong, right: precision 1 up to recall 0.5, then 2/3. At IoU 0.75 the last, moved by 2, fails
    result = map_of(
        [(0, 0, rle(0, 0), 0), (0, 0, rle(20, 20), 0)],
        [(0, 0, rle(0, 0), 0.9), (0, 0, rle(40, 40), 0.8), (0, 0, rle(22, 20), 0.7)],
        1,
        names=("crack", "hole"),
    )
    found = evaluation_curves(result)
    assert found.precision_recall_50.recall == pytest.approx(np.arange(101) / 100)
    assert found.precision_recall_50.mean == pytest.approx([1] * 51 + [2 / 3] * 50)
    assert found.precision_recall_75.mean == pytest.approx([1] * 51 + [0] * 50)
    # nothing to find of the second: no curve, and no share in the mean
    assert found.precision_recall_50.per_category == {"crack": found.precision_recall_50.mean}


def test_area_under_the_curve_is_the_average_precision():
    names = ("crack", "hole")
    objects = [(0, 0, rle(0, 0), 0), (1, 0, rle(0, 0), 0), (1, 1, rle(20, 20), 0)]
    hits = [(0, 0, rle(3, 0), 0.4), (1, 0, rle(0, 0), 0.3), (0, 1, rle(0, 0), 0.9), (1, 1, rle(20, 21), 0.5)]
    result = map_of(objects, hits, 2, names)
    found = evaluation_curves(result)
    assert 0 < result.map_75 < result.map_50 < 1
    assert np.mean(found.precision_recall_50.mean) == pytest.approx(result.map_50)
    assert np.mean(found.precision_recall_75.mean) == pytest.approx(result.map_75)
    for name in names:
        assert np.mean(found.precision_recall_50.per_category[name]) == pytest.approx(result.per_category[name].map_50)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_scores_of_right_and_wrong_detections():
    result = map_of(
        [(0, 0, rle(0, 0), 0), (0, 1, rle(0, 0), 0), (0, 0, rle(20, 20, 30), 1)],
        [
            (0, 0, rle(0, 0), 1.0),  # right, in the last bin
            (0, 0, rle(0, 0), 0.15),  # second on the same object, on an edge: in the bin above
            (0, 1, rle(3, 0), 0.42),  # IoU 0.54: right at 0.50
            (0, 0, rle(22, 22), 0.77),  # in the crowd: in neither
        ],
        1,
        names=("crack", "hole"),
    )
    found = evaluation_curves(result).detection_scores
    assert found.right == counts(_19=1, _8=1)
    assert found.wrong == counts(_3=1)
    assert found.edges == pytest.approx(np.arange(21) / 20)


def test_best_scores_of_present_and_absent_pairs():
    # image 0 present, 1 absent with two detections, 2 absent without, 3 a crowd only
    result = map_of(
        [(0, 0, rle(0, 0), 0), (3, 0, rle(0, 0), 1)],
        [(0, 0, rle(30, 30), 0.62), (1, 0, rle(0, 0), 0.11), (1, 0, rle(9, 9), 0.33), (3, 0, rle(0, 0), 0.9)],
        4,
    )
    found = evaluation_curves(result).best_scores
    # the best score of a pair counts, whether or not that detection is right
    assert found.right == counts(_12=1)
    assert found.wrong == counts(_6=1, _0=1)
