"""Generated cases: the same numbers as pycocotools, matched all at once or image by image on different workers."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3lora.evaluation.metrics.coco_map import average_table, coco_map
from sam3lora.evaluation.metrics.matching import BOXES, LARGE_MASKS, MASKS, MatchTable, match_pairs

from .coco_cases import draw_case


def pycocotools_arrays(truth: dict, results: list[dict], iou_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R, C, A) and recall (T, C, A), with categories by ascending id and the four sizes."""
    with contextlib.redirect_stdout(io.StringIO()):
        expected, found = COCO(), COCO()
        expected.dataset = truth | {"annotations": [dict(entry) for entry in truth["annotations"]]}
        found.dataset = truth | {
            "annotations": [{**entry, "id": number, "iscrowd": 0} for number, entry in enumerate(results, start=1)]
        }
        expected.createIndex()
        found.createIndex()
        evaluation = COCOeval(expected, found, iou_type)
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]


def image_by_image(truth: dict, results: list[dict], order: np.ndarray) -> MatchTable:
    """Each image matched alone, then joined, in the given order of images."""
    image_ids = [image["id"] for image in truth["images"]]
    columns = {category["id"]: column for column, category in enumerate(truth["categories"])}
    parts = []
    for row in order:
        image = truth["images"][row]
        by_pair = defaultdict(list)
        for entry in sorted(results, key=lambda entry: -entry["score"]):
            if entry["image_id"] == image["id"]:
                by_pair[0, columns[entry["category_id"]]].append(entry)
        annotations = [
            entry | {"image": 0, "category": columns[entry["category_id"]]}
            for entry in truth["annotations"]
            if entry["image_id"] == image["id"]
        ]
        parts.append(match_pairs([(image["height"], image["width"])], len(columns), annotations, by_pair))
    rows = [np.array([row]) for row in order]
    return MatchTable.join(parts, rows, np.array(image_ids, np.int64), len(columns))


@pytest.mark.parametrize(
    "seeds", [range(70), pytest.param(range(70, 10_000), marks=pytest.mark.slow)], ids=["some", "ten thousand"]
)
def test_equal_to_pycocotools(seeds):
    num_equal = 0
    for seed in seeds:
        truth, results = draw_case(seed)
        by_id = np.argsort([category["id"] for category in truth["categories"]])
        joined = image_by_image(truth, results, np.random.default_rng(seed).permutation(len(truth["images"])))
        names = [category["name"] for category in truth["categories"]]
        for found in (coco_map(truth, results), average_table(joined, names)):
            for iou_type, comparisons in (("segm", slice(MASKS, LARGE_MASKS + 1)), ("bbox", slice(BOXES, BOXES + 1))):
                precision_TRCA, recall_TCA = pycocotools_arrays(truth, results, iou_type)
                mine_TRCA = np.moveaxis(found.precision_KTRC[comparisons][..., by_id], 0, -1)
                expected_TRCA = precision_TRCA[..., : mine_TRCA.shape[-1]]
                np.testing.assert_allclose(mine_TRCA, expected_TRCA, rtol=0, atol=1e-12, err_msg=f"seed {seed}")
                if iou_type == "segm":
                    recall_TC = recall_TCA[..., 0]
                    measured = recall_TC[recall_TC > -1]
                    mean = measured.mean() if measured.size else None
                    assert found.mar_100 == (None if mean is None else pytest.approx(mean, abs=1e-12)), seed
                num_equal += bool((expected_TRCA > -1).any())
    # most cases have something to compare
    assert num_equal > 2 * len(seeds)
