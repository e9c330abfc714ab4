"""Pictures show the labels and what each model found at the threshold, in their colours and within the budget."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from sam3lora.evaluation.report.pictures import (
    Gallery,
    draw_panel,
    encode_within,
    panel_side_px,
)
from sam3lora.inference.drawing import ADAPTER_RGB, BASE_RGB, GROUND_TRUTH_RGB

from .report_cases import CRACK, HOLE, NAMES, measured
from .splits import result, write_split


@pytest.fixture
def split(tmp_path):
    """A crack in image 0 at the left, a hole in both images at the right."""
    return write_split(tmp_path / "s", [(0, CRACK, 5), (0, HOLE, 50), (1, HOLE, 50)], NAMES)


def decode(jpeg: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)


def share(panel, colour: tuple[int, int, int], columns: slice = slice(None)) -> float:
    """Part of the panel near a colour."""
    return float((np.abs(decode(panel.jpeg)[:, columns].astype(int) - colour).max(axis=2) < 40).mean())


def entry(mask_HW: np.ndarray) -> dict:
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"category_id": CRACK, "segmentation": rle, "bbox": coco_mask.toBbox(rle).tolist()}


def test_only_detections_above_the_threshold_are_drawn(split):
    base = measured(split, [result(0, CRACK, 5, 0.29)])
    adapter = measured(split, [result(0, CRACK, 5, 0.3)], "mine")
    picture = Gallery([base, adapter], num_panels=6).picture(0)
    labels, of_base, of_adapter = picture.panels
    assert of_adapter.caption == "mine: 1 right, 1 missed"
    assert [panel.kind for panel in picture.panels] == ["labels", "base", "adapter"]
    assert share(labels, GROUND_TRUTH_RGB) > 0.01
    assert share(of_adapter, ADAPTER_RGB) > 0.01
    assert share(of_base, BASE_RGB) == 0


def test_captions_count(split):
    predictions = [result(0, CRACK, 5, 0.9), result(0, CRACK, 40, 0.8), result(1, CRACK, 5, 0.1)]
    gallery = Gallery([measured(split, predictions, "mine")], num_panels=4)
    assert [panel.caption for panel in gallery.picture(0).panels] == ["labels: 2", "mine: 1 right, 1 wrong, 1 missed"]
    # of one category the others do not count
    assert [panel.caption for panel in gallery.picture(0, 1).panels] == ["labels: 1", "mine: 1 missed"]
    assert [panel.caption for panel in gallery.picture(1, 0).panels] == ["labels: none", "mine: nothing, rightly"]


def test_a_picture_of_a_category_shows_no_other(split):
    gallery = Gallery([measured(split, [result(0, HOLE, 50, 0.9)], "mine")], num_panels=4)
    right_half = slice(160, None)
    one, both = (gallery.picture(0, category).panels[0] for category in (0, None))
    assert share(one, GROUND_TRUTH_RGB) > 0.01
    assert share(one, GROUND_TRUTH_RGB, right_half) == 0
    assert share(both, GROUND_TRUTH_RGB, right_half) > 0.01
    assert share(gallery.picture(0, 0).panels[1], ADAPTER_RGB) == 0
    assert share(gallery.detections(0, 1, 0, "alarm").panels[0], ADAPTER_RGB) > 0.01


def test_masks_follow_the_picture_to_any_size():
    # to the last row and column, at sizes that do not divide
    for height, width, side in ((61, 83, 37), (64, 48, 320), (37, 37, 720)):
        mask = np.zeros((height, width), bool)
        mask[height // 2 :, width // 2 :] = True
        drawn = draw_panel(np.full((height, width, 3), 90, np.uint8), [entry(mask)], {CRACK: ""}, (255, 0, 0), side)
        assert max(drawn.shape[:2]) == min(side, 4 * max(height, width))
        reddish = drawn[:, :, 0].astype(int) - drawn[:, :, 1] > 50
        assert reddish[-3, -3]
        assert not reddish[: drawn.shape[0] // 2 - 6].any()
        assert not reddish[:, : drawn.shape[1] // 2 - 6].any()


def test_the_smallest_object_stays_visible_and_an_empty_mask_is_no_fault():
    grey, mask = np.full((1000, 1000, 3), 90, np.uint8), np.zeros((1000, 1000), bool)
    assert (draw_panel(grey, [entry(mask)], {CRACK: ""}, (255, 0, 0), 320) == 90).all()
    mask[500, 500] = True
    assert (draw_panel(grey, [entry(mask)], {CRACK: ""}, (255, 0, 0), 320) != 90).any()


def test_jpegs_keep_to_their_budget():
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    sizes = [len(encode_within(noise, budget)) for budget in (10**6, 60_000, 5_000)]
    assert sizes[0] > 60_000 >= sizes[1] > 5_000 >= sizes[2]


def test_many_panels_are_smaller():
    assert panel_side_px(0) == panel_side_px(10) == 720
    assert 720 > panel_side_px(100) > panel_side_px(200) > 320
    assert panel_side_px(10_000) == 320
