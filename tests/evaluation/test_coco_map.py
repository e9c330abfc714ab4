"""mAP: cases worked out by hand, and the same numbers as pycocotools called directly."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3lora.data.coco import CocoIndex
from sam3lora.evaluation.metrics.coco_map import coco_map
from sam3lora.evaluation.metrics.ground_truth import SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.matching import MAX_DETECTIONS

from .splits import hit, rle, truth

SHARED_DATA = Path(__file__).parents[2] / "../shared/data"
REAL_SETS = ("coco_tiny_permissive", "mushrooms", "uav_crack_dense")
ONE = pytest.approx(1, abs=1e-12)  # pycocotools adds an epsilon to denominators


def test_nothing_to_find_is_none_and_nothing_found_is_zero():
    result = coco_map({"images": [], "annotations": [], "categories": []}, [])
    assert (result.map, result.map_50, result.map_75, result.per_category) == (None, None, None, {})
    result = coco_map(truth([(1, 0, rle(2, 2))]), [])
    assert (result.map, result.per_category["crack"].num_ground_truth) == (0, 1)


def test_right_masks_on_the_right_and_on_the_wrong_images(capsys):
    # ids 0 and below are ids like any other; annotation id 0 would count as unmatched if it reached pycocotools
    ground_truth = truth([(0, 0, rle(2, 2)), (-7, 0, rle(20, 20, 8))], images=(0, -7))
    before = json.dumps(ground_truth)
    result = coco_map(ground_truth, [hit(0, 0, rle(2, 2)), hit(-7, 0, rle(20, 20, 8), 0.1)])
    assert (result.map, result.map_50, result.map_75) == (ONE, ONE, ONE)
    assert coco_map(ground_truth, [hit(0, 0, rle(20, 20, 8)), hit(-7, 0, rle(2, 2))]).map == 0
    # the input stays as it is, and pycocotools prints nothing
    assert (json.dumps(ground_truth), capsys.readouterr().out) == (before, "")


def test_iou_thresholds():
    # 10 x 10 moved by 2: IoU 80 / 120 = 0.667, right at 0.50, 0.55, 0.60, 0.65 of ten thresholds
    result = coco_map(truth([(1, 0, rle(2, 2))]), [hit(1, 0, rle(4, 2))])
    assert result.map_50 == ONE
    assert result.map_75 == 0
    assert result.map == pytest.approx(0.4)


def test_a_better_scored_false_positive_halves_precision():
    hits = [hit(1, 0, rle(2, 2), 0.5), hit(1, 0, rle(30, 20), 0.6)]
    # on the empty image it is as wrong as on the other
    assert coco_map(truth([(1, 0, rle(2, 2))]), hits).map == pytest.approx(0.5)
    elsewhere = [hits[0], hits[1] | {"image_id": 2}]
    assert coco_map(truth([(1, 0, rle(2, 2))], images=(1, 2)), elsewhere).map == pytest.approx(0.5)


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    annotations = [(1, 0, rle(2, 2)), (1, 0, rle(20, 15, 20), {"iscrowd": 1})]
    hits = [hit(1, 0, rle(2, 2), 0.5), hit(1, 0, rle(22, 16, 6), 0.9), hit(1, 0, rle(30, 20, 6), 0.8)]
    result = coco_map(truth(annotations), hits)
    assert result.map == ONE
    assert result.per_category["crack"].num_ground_truth == 1
    # without the crowd flag the same detections are two misses above the hit
    plain = [annotations[0], (1, 0, rle(20, 15, 20))]
    assert coco_map(truth(plain), hits).map < 0.5


def test_hundreds_of_masks_at_once():
    # more than a byte counts, over three images
    hits = [hit(image, 0, rle(x % 50, x // 50, 1), 0.5) for image in (1, 2, 3) for x in range(99)]
    annotations = [(image, 0, rle(2, 2)) for image in (1, 2, 3)]
    found = coco_map(truth(annotations, images=(1, 2, 3)), [*hits, *(hit(i, 0, rle(2, 2)) for i in (1, 2, 3))])
    assert (found.map, len(found.table.score_D)) == (ONE, 300)


def test_mean_is_over_categories_with_objects():
    ground_truth = truth([(1, 0, rle(2, 2)), (1, 1, rle(20, 20))], names=("crack", "hole", "leaf"))
    # category 2 has no object: a detection of it is not averaged in
    result = coco_map(ground_truth, [hit(1, 0, rle(2, 2)), hit(1, 2, rle(2, 2))])
    assert {name: entry.map for name, entry in result.per_category.items()} == {"crack": ONE, "hole": 0, "leaf": None}
    assert result.map == pytest.approx(0.5)


def test_polygons_and_any_area_in_the_file():
    polygon = [[2, 2, 12, 2, 12, 12, 2, 12]]
    # the file's area is nonsense and is not used
    assert coco_map(truth([(1, 0, polygon)]), [hit(1, 0, rle(2, 2))]).map == ONE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (hit(9, 0, rle(2, 2)), "image_id 9"),
        (hit(1, 5, rle(2, 2)), "category_id 5"),
        # pycocotools would take it for a miss
        (hit(1, 0, rle(2, 2, size_hw=(20, 60))), r"image 1 has a mask of \(height, width\) \(20, 60\).*\(60, 60\)"),
    ],
)
def test_predictions_of_other_images_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        coco_map(truth([(1, 0, rle(2, 2))]), [wrong])


def test_sizes_are_those_of_the_masks():
    # sides 31, 95, 97: below 32² px, below 96² px, above; only the medium one is found
    size_hw = (220, 220)
    objects = [(0, 0, 31), (40, 0, 95), (0, 110, 97)]
    ground_truth = truth([(1, 0, rle(*place, size_hw)) for place in objects], size_hw=size_hw)
    result = coco_map(ground_truth, [hit(1, 0, rle(*objects[1], size_hw))])
    assert (result.map_small, result.map_medium, result.map_large) == (0, ONE, 0)
    assert result.mar_100 == pytest.approx(1 / 3)
    # no object of a size: no value, rather than 0
    only_small = coco_map(truth([(1, 0, rle(*objects[0], size_hw))], size_hw=size_hw), [])
    assert (only_small.map_small, only_small.map_medium, only_small.map_large) == (0, None, None)


def test_boxes_are_the_annotations_own():
    mask, own_box = rle(2, 2), [20, 20, 8, 8]
    ground_truth = truth([(1, 0, mask, {"bbox": own_box})])
    # the box of the file and not of the mask, on both sides
    assert coco_map(ground_truth, [hit(1, 0, mask) | {"bbox": own_box}]).bbox_map == ONE
    assert coco_map(ground_truth, [hit(1, 0, mask)]).bbox_map == 0
    left_out = coco_map(ground_truth, [hit(1, 0, mask)], bbox=False)
    assert (left_out.map, left_out.bbox_map, left_out.bbox_map_50) == (ONE, None, None)
    # no box anywhere: those of the masks. 10 x 10 moved by 2 has IoU 0.667
    moved = coco_map(truth([(1, 0, mask)]), [hit(1, 0, rle(4, 2))])
    assert (moved.bbox_map, moved.bbox_map_50) == (pytest.approx(0.4), ONE)


def test_more_objects_than_can_be_found_are_announced():
    # 101 objects on image 1 and 3 on image 2: the limit itself is no reason to speak
    full = [(1, 0, rle(x % 50, x // 50, 1)) for x in range(MAX_DETECTIONS)]
    few = [(2, 0, rle(x, 0, 1)) for x in range(3)]
    crowd = [(1, 0, rle(0, 20), {"iscrowd": 1})]
    assert coco_map(truth([*full, *few, *crowd], images=(1, 2)), []).warnings == []
    crowded = truth([*full, (1, 0, rle(30, 30, 1)), *few], images=(1, 2))
    beyond = "1 image(s) hold more than 100 objects of a category, up to 101: recall cannot reach 1"
    assert coco_map(crowded, [], num_queries=101).warnings == [beyond]
    queries = "2 image(s) hold more than 2 objects of a category, the model's object queries, up to 101"
    assert coco_map(crowded, [], num_queries=2).warnings[1].startswith(queries)


# ---- pycocotools called directly ------------------------------------------------------------------------------------


def direct_stats(ground_truth: dict, hits: list[dict], iou_type: str) -> np.ndarray:
    """The twelve numbers of `summarize`, -1 for none; `loadRes` takes areas from boxes if a result has one."""
    key = "segmentation" if iou_type == "segm" else "bbox"
    with contextlib.redirect_stdout(io.StringIO()):
        direct = COCO()
        direct.dataset = json.loads(json.dumps(ground_truth))
        for annotation in direct.dataset["annotations"]:
            annotation["id"] += 1
            annotation["area"] = int(coco_mask.area(annotation["segmentation"]))
        direct.createIndex()
        names = ("image_id", "category_id", "score", key)
        evaluation = COCOeval(direct, direct.loadRes([{name: h[name] for name in names} for h in hits]), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_equals_pycocotools_called_directly():
    # crowds, three sizes, ids from 0, a category without objects, an image with more than 100 detections
    rng, size_hw = np.random.default_rng(0), (160, 160)
    annotations, hits = [], []

    def add_hit(image: int, category: int, x: int, y: int, side: int) -> None:
        box = {"bbox": [float(x), float(y), float(side), float(side + 1)]}
        hits.append(hit(image, category, rle(x, y, side, size_hw), float(rng.random())) | box)

    for image in range(8):
        for category in range(3):
            for _ in range(rng.integers(0, 5)):
                side = int(rng.choice([8, 20, 50, 110]))
                x, y = (int(value) for value in rng.integers(0, 160 - side, 2))
                more = {"iscrowd": int(rng.random() < 0.15), "bbox": [x, y, side, side]}
                annotations.append((image, category, rle(x, y, side, size_hw), more))
                if rng.random() < 0.8:
                    add_hit(image, category, max(x + int(rng.integers(-2, 3)), 0), y, side)
            for _ in range(130 if (image, category) == (0, 0) else 2):
                add_hit(image, category, *(int(value) for value in rng.integers(0, 130, 2)), 25)
    ground_truth = truth(annotations, images=range(8), names=("a", "b", "c", "nothing"), size_hw=size_hw)
    result = coco_map(ground_truth, hits)
    assert 0.1 < result.map < 0.9

    stats = direct_stats(ground_truth, hits, "segm")
    mine = [result.map, result.map_50, result.map_75, result.map_small, result.map_medium, result.map_large]
    np.testing.assert_allclose([*mine, result.mar_100], stats[[0, 1, 2, 3, 4, 5, 8]], rtol=0, atol=1e-12)
    boxes = direct_stats(ground_truth, hits, "bbox")
    np.testing.assert_allclose([result.bbox_map, result.bbox_map_50], boxes[:2], rtol=0, atol=1e-12)
    for category, name in enumerate(("a", "b", "c")):
        part = [[h for h in these if h["category_id"] == category] for these in (ground_truth["annotations"], hits)]
        stats = direct_stats(ground_truth | {"annotations": part[0]}, part[1], "segm")
        entry = result.per_category[name]
        mine = [entry.map, entry.map_50, entry.map_75, entry.mar_100]
        np.testing.assert_allclose(mine, stats[[0, 1, 2, 8]], rtol=0, atol=1e-12)
        assert entry.num_ground_truth == sum(not a["iscrowd"] for a in part[0])


# ---- real splits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL_SETS)
def test_annotations_of_real_splits_as_predictions(name):
    folder = SHARED_DATA / name / "valid"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: real data sets are not part of the project")
    index = CocoIndex.from_folder(folder)
    ground_truth = SplitTruth(index, prompted_categories(index)).to_coco()
    objects = [a for a in ground_truth["annotations"] if not a["iscrowd"]]
    keys = ("image_id", "category_id", "segmentation", "bbox")
    hits = [{key: a[key] for key in keys} | {"score": 1 - i / 1e5} for i, a in enumerate(objects)]
    result = coco_map(ground_truth, hits)
    counts = Counter((h["image_id"], h["category_id"]) for h in hits).values()
    reach = sum(min(count, MAX_DETECTIONS) for count in counts) / len(hits)
    # mushrooms: one category, and more objects in an image than detections are looked at
    assert bool(result.warnings) == (reach < 1)
    expected = 1 if reach == 1 else np.mean(np.linspace(0, 1, 101) <= reach)
    values = [result.map, result.map_50, result.map_75, result.bbox_map, result.bbox_map_50]
    assert values == [pytest.approx(expected, abs=1e-9)] * 5
    assert result.mar_100 == pytest.approx(reach, abs=1e-9)
