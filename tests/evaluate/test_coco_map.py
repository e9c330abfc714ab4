"""mAP: cases worked out by hand, and the same numbers as pycocotools called directly."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3lora.evaluate.coco_map import coco_map

H, W = 40, 50
NONSENSE = 1e12  # beyond every size range: an object of this area would be left out
ONE = pytest.approx(1, abs=1e-12)  # pycocotools adds an epsilon to denominators


def rle(x: int, y: int, side: int) -> dict:
    mask = np.zeros((H, W), np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    found = coco_mask.encode(mask)
    return {"size": [H, W], "counts": found["counts"].decode()}


def truth(annotations, images=(1,), names=("crack",)) -> dict:
    """Annotations are (image id, category id, segmentation) and optionally more keys; ids count from 0 on purpose."""
    entries = [
        {
            "id": number,
            "image_id": i,
            "category_id": c,
            "segmentation": s,
            "iscrowd": 0,
            "area": NONSENSE,
            **(more or {}),
        }
        for number, (i, c, s, more) in enumerate((*a, None)[:4] for a in annotations)
    ]
    return {
        "images": [{"id": i, "height": H, "width": W} for i in images],
        "annotations": entries,
        "categories": [{"id": c, "name": name} for c, name in enumerate(names)],
    }


def hit(image: int, category: int, segmentation: dict, score: float = 0.9) -> dict:
    return {"image_id": image, "category_id": category, "segmentation": segmentation, "score": score}


def test_nothing_at_all_is_none():
    # no image, no category: nothing can be measured, and nothing fails
    result = coco_map({"images": [], "annotations": [], "categories": []}, [])
    assert (result.map, result.map_50, result.map_75, result.per_category) == (None, None, None, {})


def test_no_predictions_is_zero():
    result = coco_map(truth([(1, 0, rle(2, 2, 10))]), [])
    assert result.map == 0
    assert result.per_category["crack"].num_ground_truth == 1


def test_perfect_predictions_are_one_with_ids_from_zero():
    # annotation id 0 would count as unmatched if it reached pycocotools
    result = coco_map(truth([(1, 0, rle(2, 2, 10)), (1, 0, rle(20, 20, 8))]), [
        hit(1, 0, rle(2, 2, 10)),
        hit(1, 0, rle(20, 20, 8), 0.1),
    ])  # fmt: skip
    assert (result.map, result.map_50, result.map_75) == (ONE, ONE, ONE)


def test_predictions_of_another_image_are_zero():
    ground_truth = truth([(0, 0, rle(2, 2, 10)), (-7, 0, rle(20, 20, 10))], images=(0, -7))
    # the right masks on the wrong images; ids 0 and below are ids like any other
    swapped = [hit(0, 0, rle(20, 20, 10)), hit(-7, 0, rle(2, 2, 10))]
    assert coco_map(ground_truth, swapped).map == 0
    right = [hit(0, 0, rle(2, 2, 10)), hit(-7, 0, rle(20, 20, 10))]
    assert coco_map(ground_truth, right).map == ONE


def test_iou_thresholds():
    # 10 x 10 moved by 2: IoU 80 / 120 = 0.667, right at 0.50, 0.55, 0.60, 0.65 of ten thresholds
    result = coco_map(truth([(1, 0, rle(2, 2, 10))]), [hit(1, 0, rle(4, 2, 10))])
    assert result.map_50 == ONE
    assert result.map_75 == 0
    assert result.map == pytest.approx(0.4)


def test_a_better_scored_false_positive_halves_precision():
    hits = [hit(1, 0, rle(2, 2, 10), 0.5), hit(1, 0, rle(30, 20, 10), 0.6)]
    # on the empty image it is as wrong as on the other
    assert coco_map(truth([(1, 0, rle(2, 2, 10))]), hits).map == pytest.approx(0.5)
    elsewhere = [hits[0], hits[1] | {"image_id": 2}]
    assert coco_map(truth([(1, 0, rle(2, 2, 10))], images=(1, 2)), elsewhere).map == pytest.approx(0.5)


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    annotations = [(1, 0, rle(2, 2, 10)), (1, 0, rle(20, 15, 20), {"iscrowd": 1})]
    hits = [hit(1, 0, rle(2, 2, 10), 0.5), hit(1, 0, rle(22, 16, 6), 0.9), hit(1, 0, rle(30, 20, 6), 0.8)]
    result = coco_map(truth(annotations), hits)
    assert result.map == ONE
    assert result.per_category["crack"].num_ground_truth == 1
    # without the crowd flag the same detections are two misses above the hit
    plain = [annotations[0], (1, 0, rle(20, 15, 20))]
    assert coco_map(truth(plain), hits).map < 0.5


def test_mean_is_over_categories_with_objects():
    ground_truth = truth([(1, 0, rle(2, 2, 10)), (1, 1, rle(20, 20, 10))], names=("crack", "hole", "leaf"))
    # category 2 has no object: a detection of it is not averaged in
    result = coco_map(ground_truth, [hit(1, 0, rle(2, 2, 10)), hit(1, 2, rle(2, 2, 10))])
    assert {name: entry.map for name, entry in result.per_category.items()} == {"crack": ONE, "hole": 0, "leaf": None}
    assert result.map == pytest.approx(0.5)


def test_polygons_and_any_area_in_the_file():
    polygon = [[2, 2, 12, 2, 12, 12, 2, 12]]
    # the file's area is nonsense and is not used
    assert coco_map(truth([(1, 0, polygon)]), [hit(1, 0, rle(2, 2, 10))]).map == ONE


def test_unknown_ids_are_named():
    with pytest.raises(ValueError, match="image_id 9"):
        coco_map(truth([(1, 0, rle(2, 2, 10))]), [hit(9, 0, rle(2, 2, 10))])
    with pytest.raises(ValueError, match="category_id 5"):
        coco_map(truth([(1, 0, rle(2, 2, 10))]), [hit(1, 5, rle(2, 2, 10))])


def test_silent_and_inputs_unchanged(capsys):
    ground_truth, hits = truth([(1, 0, rle(2, 2, 10))]), [hit(1, 0, rle(2, 2, 10))]
    before = json.dumps([ground_truth, hits])
    coco_map(ground_truth, hits)
    assert capsys.readouterr().out == ""
    assert json.dumps([ground_truth, hits]) == before


def test_equals_pycocotools_called_directly():
    rng = np.random.default_rng(0)
    annotations, hits = [], []
    for image in range(1, 9):
        for category in range(3):
            for _ in range(rng.integers(0, 4)):
                x, y, side = rng.integers(0, 30), rng.integers(0, 20), rng.integers(5, 18)
                annotations.append((image, category, rle(x, y, side), {"iscrowd": int(rng.random() < 0.1)}))
                if rng.random() < 0.8:
                    move = rng.integers(-2, 3)
                    hits.append(hit(image, category, rle(max(x + move, 0), y, side), float(rng.random())))
            hits.append(hit(image, category, rle(rng.integers(0, 30), rng.integers(0, 20), 8), float(rng.random())))
    ground_truth = truth(annotations, images=range(1, 9), names=("a", "b", "c"))
    result = coco_map(ground_truth, hits)

    with contextlib.redirect_stdout(io.StringIO()):
        direct = COCO()
        direct.dataset = json.loads(json.dumps(ground_truth))
        for annotation in direct.dataset["annotations"]:
            annotation["id"] += 1
            annotation["area"] = int(coco_mask.area(annotation["segmentation"]))
            annotation["bbox"] = coco_mask.toBbox(annotation["segmentation"]).tolist()
        direct.createIndex()
        evaluation = COCOeval(direct, direct.loadRes(json.loads(json.dumps(hits))), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 0.1 < result.map < 0.9
    np.testing.assert_allclose([result.map, result.map_50, result.map_75], evaluation.stats[:3], atol=1e-12)
    np.testing.assert_allclose(np.mean([entry.map for entry in result.per_category.values()]), result.map, atol=1e-12)
