"""Pictures: colours where the masks are, labels inside the picture, sizes that can be read."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from sam3lora.inference.drawing import (
    ADAPTER_RGB,
    BASE_RGB,
    Marked,
    draw_instances,
    encode_image,
    enlarge,
    mark_coco,
)

GREY = 120


def image(height: int = 500, width: int = 600) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def blob(height: int = 500, width: int = 600, box=(200, 150, 320, 280)) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def changed(picture: np.ndarray, before: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width, height of what was drawn."""
    return cv2.boundingRect((picture != before).any(axis=2).astype(np.uint8))


def test_nothing_to_draw_leaves_the_image():
    before = image()
    after = draw_instances(before, [])
    np.testing.assert_array_equal(after, before)
    assert after is not before
    draw_instances(before, [Marked("größer 裂縫", np.zeros((500, 600), bool))])  # an empty mask and any text


def test_fill_is_inside_the_mask_only_and_the_input_is_kept():
    before, mask = image(), blob()
    mask[200:230, 240:280] = False  # a hole
    drawn = draw_instances(before, [Marked("crack", mask)], colours_rgb=ADAPTER_RGB, show_labels=False)
    assert (before == GREY).all()
    red, green, _ = drawn[180, 260].astype(int)
    assert red > GREY > green
    for outside in ((400, 100), (215, 260)):
        np.testing.assert_array_equal(drawn[outside], [GREY] * 3)
    np.testing.assert_array_equal(drawn[199, 260], ADAPTER_RGB)  # the outline
    np.testing.assert_allclose(changed(drawn, before), [200, 150, 120, 130], atol=15)


def test_boxes_are_drawn_when_asked_for():
    marked = [Marked("", None, (50, 60, 200, 300))]
    assert (draw_instances(image(), marked) == GREY).all()
    drawn = draw_instances(image(), marked, show_boxes=True, colours_rgb=BASE_RGB)
    np.testing.assert_array_equal(drawn[60, 120], BASE_RGB)
    np.testing.assert_array_equal(drawn[180, 120], [GREY] * 3)


@pytest.mark.parametrize("corner", [(0, 0, 40, 40), (560, 460, 600, 500), (560, 0, 600, 40)])
def test_labels_stay_inside_at_the_corners(corner):
    before = image()
    bare = draw_instances(before, [Marked("", blob(box=corner))])
    drawn = draw_instances(before, [Marked("a rather long prompt 0.87", blob(box=corner))])
    # the whole tag is visible: it is far wider than the object
    assert changed(drawn, bare)[2] > 120


def test_labels_do_not_cover_each_other():
    # objects with the same upper edge: tags at different heights
    def tags_height(count: int) -> int:
        drawn, bare = (draw_instances(image(), [Marked(text, blob())] * count) for text in ("crack 0.9", ""))
        return changed(drawn, bare)[3]

    assert tags_height(3) >= 3 * tags_height(1) - 2


def test_small_images_are_enlarged_and_large_ones_are_not():
    small = np.full((224, 224, 3), GREY, np.uint8)
    assert draw_instances(small, []).shape == (448, 448, 3)
    assert draw_instances(np.full((30, 40, 3), GREY, np.uint8), []).shape == (120, 160, 3)
    assert draw_instances(image(600, 800), []).shape == (600, 800, 3)
    # masks go along: the same part of the picture is coloured
    drawn = draw_instances(small, [Marked("", blob(224, 224, (100, 50, 150, 90)))], colours_rgb=ADAPTER_RGB)
    x, y, width, height = changed(drawn, draw_instances(small, []))
    np.testing.assert_allclose([x, y, width, height], [200, 100, 100, 80], atol=8)


@pytest.mark.parametrize(("size_hw", "factor"), [((20, 100), 4), ((20, 1500), 2), ((8000, 20), 1)])
def test_long_strips_are_not_enlarged_beyond_a_picture(size_hw, factor):
    canvas, used = enlarge(np.zeros((*size_hw, 3), np.uint8))
    assert (used, canvas.shape) == (factor, (size_hw[0] * factor, size_hw[1] * factor, 3))


def test_coco_entries_become_labels_and_masks():
    entry = {"category_id": 4, "bbox": [10, 20, 30, 40], "segmentation": [[10, 20, 40, 20, 40, 60, 10, 60]]}
    (labelled,) = mark_coco([entry], {4: "gear"}, (100, 120))
    assert labelled.label == "gear"
    assert labelled.box_xyxy == (10, 20, 40, 60)
    assert labelled.mask_HW.sum() == 30 * 40
    (found,) = mark_coco([entry | {"score": 0.866}], {4: "gear"}, (100, 120))
    assert found.label == "gear 0.87"
    (boxed,) = mark_coco([{"category_id": 4, "bbox": [1, 2, 3, 4]}], {4: "gear"}, (100, 120))
    assert boxed.mask_HW is None


def test_encoded_colours_are_rgb():
    decoded = cv2.imdecode(
        np.frombuffer(encode_image(np.full((8, 8, 3), (250, 10, 60), np.uint8), ".png"), np.uint8), 1
    )
    np.testing.assert_array_equal(decoded[0, 0], [60, 10, 250])
