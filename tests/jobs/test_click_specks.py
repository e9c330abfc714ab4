"""Boxes around masks, with and without a speck."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from jobs.bench.click_specks import box_iou, has_far_speck, largest_part, main
from jobs.bench.scripts import run_script


def rle(*boxes_xyxy: tuple[int, int, int, int]) -> dict:
    mask = np.zeros((40, 40), np.uint8, order="F")
    for x0, y0, x1, y1 in boxes_xyxy:
        mask[y0:y1, x0:x1] = 1
    return coco_mask.encode(mask)


def test_a_folder_that_is_not_there_is_told_in_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["click_specks", str(tmp_path / "none"), "8"])
    assert run_script(main) == 2
    said = f"no folder {tmp_path / 'none'}; expected the folder of a COCO data set or of one of its splits"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_boxes_and_far_specks():
    nothing, square = rle(), rle((10, 10, 30, 30))
    near, far = rle((10, 10, 30, 30), (31, 12, 32, 13)), rle((10, 10, 30, 30), (36, 12, 37, 13))
    assert [box_iou(square, one) for one in (square, near, far, nothing)] == pytest.approx([1, 20 / 22, 20 / 27, 0])
    assert [has_far_speck(one) for one in (nothing, square, near, far)] == [False, False, False, True]
    assert largest_part(far)["counts"] == square["counts"]
