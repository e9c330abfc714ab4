"""Masks in all their forms are one and the same mask."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lora.engine.detections import Detections
from serve_app.http.formats import is_quick, prompt_response, rle_to_png

from .http_cases import SIZE_HW, found, rectangle


def decoded(masks: str, results: list[Detections]) -> list[dict]:
    return [prompt_response(found, masks).model_dump(exclude_unset=True) for found in results]


def test_rle_is_unchanged_and_nothing_found_is_an_empty_list():
    none, one = decoded("rle", [found("crack", 0), found("a", 1)])
    assert none == {"prompt": "crack", "presence": 0.75, "num_detections": 0, "detections": []}
    (detection,) = one["detections"]
    assert (detection["mask"], detection["area_px"]) == (rectangle(2, 3, 12, 9), 60)


def test_boxes_scores_and_order():
    result = decoded("none", [found("b", 2, masks=False), found("a", 1, masks=False)])
    assert [entry["prompt"] for entry in result] == ["b", "a"]
    assert result[0]["detections"] == [
        {"score": 0.9, "box_xyxy": [2.0, 3.0, 12.0, 9.0]},
        {"score": 0.6, "box_xyxy": [3.0, 3.0, 13.0, 9.0]},
    ]


def test_polygon_and_png_give_the_mask_back():
    ring = np.zeros(SIZE_HW, np.uint8)
    ring[5:40, 5:30] = 1
    ring[3:9, 40:60] = 1  # a second part
    rle = coco_mask.encode(np.asfortranarray(ring))
    both = Detections(
        "a",
        1.0,
        SIZE_HW,
        np.ones(1, np.float32),
        np.zeros((1, 4), np.float32),
        [rle | {"counts": rle["counts"].decode()}],
    )
    polygons = decoded("polygon", [both])[0]["detections"][0]["mask"]
    assert len(polygons) == 2
    again = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE_HW)))
    np.testing.assert_array_equal(again, ring)

    png = Image.open(io.BytesIO(base64.b64decode(decoded("png", [both])[0]["detections"][0]["mask"])))
    assert (png.size, png.mode) == ((64, 48), "1")
    np.testing.assert_array_equal(np.asarray(png), ring.astype(bool))


def test_empty_mask():
    empty = found("a", 1)
    empty.rles[0] = rectangle(0, 0, 0, 0)
    assert decoded("polygon", [empty])[0]["detections"][0] | {"score": 0} == {
        "score": 0,
        "box_xyxy": [2.0, 3.0, 12.0, 9.0],
        "area_px": 0,
        "mask": [],
    }
    assert not np.asarray(Image.open(io.BytesIO(base64.b64decode(rle_to_png(empty.rles[0]))))).any()


@pytest.mark.parametrize("answers", [[True], [False, False, True]], ids=["before the first", "between two"])
def test_no_mask_is_drawn_after_the_client_left(answers: list[bool]):
    left = iter(answers)
    with pytest.raises(TimeoutError):
        prompt_response(found("a", 5), "png", is_over=lambda: next(left))


def test_only_quick_work_runs_on_the_loop():
    assert is_quick([found("a", 2)], "rle")
    assert not is_quick([found("a", 100)], "rle")
    assert not is_quick([found("a", 1)], "png")
