"""Masks that are read in bulk have the boxes of those that are read one by one, and the damaged ones are refused."""

from __future__ import annotations

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.plain_rles import decoder, measure_rles
from sam3lora.data.rle import encode_rle, read_rle


def drawn_masks(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = []
    for number in range(count):
        mask = rng.random(rng.integers(1, 50, 2)) < rng.random() ** 3
        if number % 3 == 0:
            mask[:] = False
            y, x = (rng.integers(side) for side in mask.shape)
            mask[y : y + 9, x : x + 9] = True
        masks.append(mask)
    return masks


def measure(rles: list[dict], sizes: list[tuple[int, int]]):
    return measure_rles(decoder.decode(msgspec.json.encode(rles)), np.array(sizes))


def test_boxes_are_those_of_the_masks():
    masks = drawn_masks(1000)
    boxes, is_good = measure([encode_rle(mask) for mask in masks], [mask.shape for mask in masks])
    for mask, box, good in zip(masks, boxes, is_good, strict=True):
        assert good == mask.any()
        if good:
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] or np.ptp(xs) > 0
            x, y, width, height = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))
            assert box.tolist() == [x, y, x + width, y + height]


def test_damaged_masks_are_refused_and_spoil_no_other():
    rng = np.random.default_rng(1)
    num_refused = 0
    for mask in drawn_masks(500):
        rle = encode_rle(mask)
        text = list(rle["counts"])
        for place in rng.integers(0, len(text), rng.integers(1, 3)):
            text[place] = chr(rng.integers(40, 116))
        damaged = rle | {"counts": "".join(text[: rng.integers(1, len(text) + 1)])}
        try:
            expected = coco_mask.area(read_rle(damaged)) > 0
        except ValueError:
            expected = False
        _, is_good = measure([damaged, rle], [mask.shape] * 2)
        assert is_good.tolist() == [expected, mask.any()]
        num_refused += not expected
    assert num_refused > 300
    assert not measure([encode_rle(np.ones((4, 6), bool))], [(6, 4)])[1].any()  # another size than the image's
