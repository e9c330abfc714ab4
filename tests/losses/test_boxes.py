"""Boxes drawn by hand."""

import math

import pytest
import torch

from sam3lora.losses.boxes import box_area, box_giou, box_iou, cxcywh_to_xyxy

# On a grid: (a, b, IoU, GIoU), boxes as corners.
DRAWN = {
    "same": ([0, 0, 2, 2], [0, 0, 2, 2], 1.0, 1.0),
    "half of it": ([0, 0, 2, 2], [0, 0, 2, 1], 0.5, 0.5),
    # Overlap 1, union 7, enclosing 9: the union leaves 2 of 9 empty.
    "corners overlap": ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
    "touching": ([0, 0, 1, 1], [1, 0, 2, 1], 0.0, 0.0),
    # Union 2 in an enclosing box of 4.
    "apart": ([0, 0, 1, 1], [3, 0, 4, 1], 0.0, -0.5),
}


def test_no_boxes():
    # Nothing in, nothing out, with the right shapes.
    none, some = torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert cxcywh_to_xyxy(none).shape == (0, 4)
    assert box_iou(none[:, None], some[None]).shape == (0, 1)
    assert box_giou(none, none).shape == (0,)


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_boxes(name):
    # Known overlaps, in both orders.
    a, b, iou, giou = DRAWN[name]
    a, b = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    for first, second in [(a, b), (b, a)]:
        assert box_iou(first, second).item() == pytest.approx(iou, abs=1e-6)
        assert box_giou(first, second).item() == pytest.approx(giou, abs=1e-6)


def test_conversion_and_area():
    # A box of 2 by 4 around (3, 5).
    box = torch.tensor([3.0, 5.0, 2.0, 4.0])
    corners = cxcywh_to_xyxy(box)
    assert corners.tolist() == [2.0, 3.0, 4.0, 7.0]
    assert box_area(corners).item() == 8.0


def test_boxes_without_area_are_nan():
    # Documented: no epsilon hides two empty boxes.
    point = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert math.isnan(box_iou(point, point).item())
