"""Clicks and IoUs of run-length codes are exactly those of whole masks, in cases drawn by chance and by hand."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from jobs.bench.click_masks import ClickWorkload, click_on_arrays, click_on_codes, plain_iou, plain_next_click
from sam3lora.data.rle import encode_rle
from sam3lora.engine.clicks.click import Click
from sam3lora.evaluation.clicks.meter import LEAST_SHARE, is_measured
from sam3lora.evaluation.clicks.next_click import mask_iou, next_click


def drawn_by_chance(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Noise, smooth parts with holes, a box that may touch the borders, everything or nothing."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.random(size_hw) < rng.choice([0.02, 0.5, 0.98])
    if kind == 1:
        return cv2.GaussianBlur(rng.standard_normal(size_hw), (0, 0), 2.5) > 0.02
    if kind == 2:
        mask = np.zeros(size_hw, dtype=bool)
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, side + 1, 2)) for side in size_hw)
        mask[y0:y1, x0:x1] = True
        mask[(y0 + y1) // 2 : y1 - 2, (x0 + x1) // 2 : x1 - 1] = False
        return mask
    return np.full(size_hw, kind == 3)


def cases() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Truth, found and ignored."""
    rng = np.random.default_rng(3)
    for number in range(400):
        size_hw = (int(rng.integers(1, 48)), int(rng.integers(1, 48)))
        truth, found, ignored = (drawn_by_chance(rng, size_hw) for _ in range(3))
        if number % 3 == 0:  # an answer that is nearly right
            found = truth ^ (rng.random(size_hw) < 0.03)
        yield truth, found, ignored if number % 2 else None


def test_clicks_and_ious_are_those_of_whole_masks():
    labels = []
    for truth, found, ignored in cases():
        codes = [None if mask is None else encode_rle(mask) for mask in (truth, found, ignored)]
        assert mask_iou(*codes) == plain_iou(truth, found, ignored)
        clicks: list[Click] = []
        for _ in range(4):
            click = next_click(codes[0], codes[1], clicks, codes[2])
            assert click == plain_next_click(truth, found, clicks, ignored)
            if click is None:
                break
            clicks.append(click)
        labels.append(clicks[0].label if clicks else None)
    assert all(labels.count(label) > 30 for label in (None, 0, 1))  # no click, and clicks of both labels, occur


def test_sizes_are_those_of_whole_masks():
    measured = []
    for truth, _, ignored in cases():
        area = int((truth if ignored is None else truth & ~ignored).sum())
        measured.append(is_measured(encode_rle(truth), None if ignored is None else encode_rle(ignored)))
        assert measured[-1] == (area > 0 and area >= LEAST_SHARE * truth.size)
    assert set(measured) == {True, False}


@pytest.mark.parametrize("num_objects", [1, 6])
def test_objects_of_an_image_are_as_whole_masks(num_objects):
    """Masks that get better, of the benchmark."""
    workload = ClickWorkload(0.3, num_objects, 4)
    truths = [workload.mask(number, None) for number in range(num_objects)]
    answers = [[workload.mask(number, clicks) for clicks in range(1, 5)] for number in range(num_objects)]
    traces = click_on_codes(truths, answers)
    assert traces == click_on_arrays(truths, answers)
    assert all(len(clicks) == 4 and ious[0] == 0 < ious[1] < ious[-1] for ious, clicks in traces)
