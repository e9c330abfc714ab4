"""Converters of the one result."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lora.engine.detections import Detections


@pytest.fixture
def found() -> Detections:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:7] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    rles = [{"size": [6, 8], "counts": rle["counts"].decode()}]
    scores, boxes = np.array([0.75], np.float32), np.array([[2, 1, 7, 4]], np.float32)
    return Detections("crack", 0.9, (6, 8), scores, boxes, rles)


def test_coco_results_have_xywh_boxes(found):
    (entry,) = found.to_coco(3, 5)
    assert entry == {
        "image_id": 3,
        "category_id": 5,
        "segmentation": found.rles[0],
        "bbox": [2, 1, 5, 3],
        "score": 0.75,
    }
    found.rles = None
    assert "segmentation" not in found.to_coco(3, 5)[0]


def test_supervision_reads_the_same(found):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    converted = found.to_supervision()
    assert isinstance(converted, supervision.Detections)
    np.testing.assert_array_equal(converted.xyxy, found.boxes_xyxy)
    np.testing.assert_array_equal(converted.mask, found.masks)
    assert (converted.confidence.tolist(), converted.data["class_name"].tolist()) == ([0.75], ["crack"])
