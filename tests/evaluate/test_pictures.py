"""Comparison pictures show the first images, with what each model found above the threshold."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.evaluate.ground_truth import build_ground_truth, prompted_categories
from sam3lora.evaluate.pictures import MAX_DRAWN, _best, _caption, comparison_pictures
from sam3lora.evaluate.split import SplitMetrics
from sam3lora.infer.drawing import ADAPTER_RGB, BASE_RGB


@pytest.fixture
def truth(shapes) -> dict:
    index = CocoIndex.from_folder(shapes / "valid")
    return build_ground_truth(index, prompted_categories(index))[0]


def metrics(truth: dict, predictions: list[dict]) -> SplitMetrics:
    return SplitMetrics(None, None, None, None, {}, 0, 0, predictions, truth)


def results(truth: dict, score: float) -> list[dict]:
    return [{**annotation, "score": score} for annotation in truth["annotations"]]


def share(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((picture == colour).all(axis=2).mean())


def test_only_detections_above_the_threshold_are_drawn(shapes, truth):
    base, adapter = metrics(truth, results(truth, 0.29)), metrics(truth, results(truth, 0.31))
    pictures = list(comparison_pictures(shapes / "valid", base, adapter, count=3, threshold=0.3))
    assert [name for name, _ in pictures] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    busiest = max(pictures, key=lambda pair: share(pair[1], ADAPTER_RGB))[1]
    # the base's column has its caption's mark only
    assert share(busiest, ADAPTER_RGB) > 3 * share(busiest, BASE_RGB) > 0


def test_near_duplicates_of_a_category_are_drawn_once(truth):
    first, other = truth["annotations"][0], {**truth["annotations"][0], "category_id": 99}
    image = next(image for image in truth["images"] if image["id"] == first["image_id"])
    predictions = [{**first, "score": 0.5}, {**first, "score": 0.8}, {**other, "score": 0.4}]
    kept = _best(metrics(truth, predictions), image, threshold=0.3, nms_iou=0.7)
    # the better one stays, and the same mask under another prompt is another answer
    assert [(p["category_id"], p["score"]) for p in kept] == [(first["category_id"], 0.8), (99, 0.4)]


def test_caption_says_when_not_everything_is_drawn():
    assert _caption("base", MAX_DRAWN) == f"base: {MAX_DRAWN}"
    assert "best" in _caption("base", MAX_DRAWN + 1)
