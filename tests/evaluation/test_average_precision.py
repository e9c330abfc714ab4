"""Weighted average precision: pycocotools' numbers with weights of 1, and those of a repeated data set with others."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.evaluation.metrics.average_precision import average_precision, category_detections
from sam3lora.evaluation.metrics.coco_map import MapResult

from .splits import map_of, rle

NAMES = ("c0", "c1", "c2", "c3")


def weighted(result: MapResult, weights=None) -> float | None:
    weights_I = None if weights is None else np.asarray(weights)
    return average_precision(category_detections(result.table), weights_I)


def random_case(num_images: int = 12, num_categories: int = 4) -> tuple[list, list]:
    """Crowds, near misses, absent categories; scores that are equal between images, though not within one."""
    rng = np.random.default_rng(3)
    objects, hits = [], []
    for image in range(num_images):
        for category in range(num_categories - 1):
            scores = iter(rng.permutation(10) / 10)
            for place in rng.permutation(9)[: rng.integers(0, 5)]:
                x, y = (int(value) * 20 for value in divmod(place, 3))
                objects.append((image, category, rle(x, y), int(rng.random() < 0.15)))
                if rng.random() < 0.8:
                    hits.append((image, category, rle(x + int(rng.integers(0, 4)), y), next(scores)))
        hits += [(image, category, rle(45, 45, 6), float(rng.random())) for category in range(num_categories)]
    # larger than 32² px: all sizes count
    return [*objects, (0, 0, rle(20, 20, 40), 0)], [*hits, (0, 0, rle(20, 20, 40), 0.55)]


def test_nothing_to_find_is_none_and_nothing_found_is_zero():
    assert weighted(map_of([], [], 0)) is None
    assert weighted(map_of([], [(0, 0, rle(0, 0), 0.5)], 1)) is None
    assert weighted(map_of([(0, 0, rle(0, 0), 0)], [], 1)) == 0


def test_equals_pycocotools_with_weights_of_one():
    objects, hits = random_case()
    result = map_of(objects, hits, 12, NAMES)
    assert 0.1 < result.map < 0.9
    assert weighted(result) == pytest.approx(result.map, abs=1e-12)
    assert weighted(result, [1] * 12) == weighted(result)
    for category, detections in enumerate(category_detections(result.table)):
        precision_TR = detections.precision()
        entry = result.per_category[f"c{category}"]
        if entry.map is None:
            assert precision_TR is None
            continue
        value_T = precision_TR.mean(axis=1)
        found = [value_T.mean(), value_T[0], value_T[5]]
        np.testing.assert_allclose(found, [entry.map, entry.map_50, entry.map_75], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_repetitions_of_images(seed):
    # pycocotools on a data set in which each image occurs as often as it weighs
    objects, hits = random_case()
    weights = np.random.default_rng(seed).multinomial(12, [1 / 12] * 12)
    assert 0 in weights
    assert max(weights) > 1
    source = np.repeat(np.arange(12), weights)
    again = [[(copy, *entry[1:]) for copy, i in enumerate(source) for entry in all_ if entry[0] == i]
             for all_ in (objects, hits)]  # fmt: skip
    expected = map_of(*again, len(source), NAMES).map
    assert weighted(map_of(objects, hits, 12, NAMES), weights) == pytest.approx(expected, abs=1e-12)


def test_a_weight_of_zero_leaves_the_image_out():
    # image 0 is right, image 1 wrong with a better score, and only image 0 has an object
    result = map_of([(0, 0, rle(0, 0), 0)], [(0, 0, rle(0, 0), 0.5), (1, 0, rle(0, 0), 0.9)], 2)
    assert weighted(result, [1, 1]) == pytest.approx(0.5)
    assert weighted(result, [1, 0]) == pytest.approx(1)
    assert weighted(result, [1, 3]) == pytest.approx(0.25)
    assert weighted(result, [0, 1]) is None


def test_flags_by_hand():
    # scores fall across images; the crowd's detection is matched and ignored, the shifted one fails from IoU 0.7 on
    result = map_of(
        [(0, 0, rle(0, 0), 0), (1, 0, rle(20, 20, 30), 1)],
        [(0, 0, rle(2, 0), 0.3), (1, 0, rle(22, 22), 0.8), (1, 0, rle(0, 0), 0.5)],
        3,
    )
    found = category_detections(result.table)[0]
    assert found.scores_D.tolist() == [0.8, 0.5, 0.3]
    assert found.image_index_D.tolist() == [1, 1, 0]
    assert found.is_matched_TD[[0, 3, 4]].tolist() == [[True, False, True], [True, False, True], [True, False, False]]
    assert found.is_ignored_TD.tolist() == [[True, False, False]] * 10
    assert found.num_objects_I.tolist() == [1, 0, 0]
    assert result.table.is_annotated_IC.tolist() == [[True], [True], [False]]
