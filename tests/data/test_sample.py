"""Decoding of single records: pixels, queries and packed targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.data.images import ImageError
from sam3lora.data.pipeline import iterate_batches
from sam3lora.data.plan import plan_run
from sam3lora.data.prompts import Query
from sam3lora.data.sample import DecodeSettings, decode_record, matched_objects, rows_with_queries

from .coco_builder import annotation, square


def decode(path, **changes):
    index = CocoIndex.from_folder(path)
    settings = DecodeSettings(**{"names": index.names, "resolution": 64, "mask_size": 64, **changes})
    return decode_record(index.record(0), settings)


def masks(sample, size=64):
    bits = np.unpackbits(sample.masks_packed, axis=1)[:, : size * size]
    return bits.reshape(-1, size, size).astype(bool)


def test_boxes_and_masks_are_relative_to_the_frame(folder):
    # 80 x 60 pixels -> 64 x 64: a square of 20 at (10, 10) becomes 16 wide and 21.3 high
    sample = decode(folder.write([annotation(0)]))
    assert sample.images_NHWC.shape == (1, 64, 64, 3)
    assert sample.original_sizes_hw.tolist() == [[60, 80]]
    np.testing.assert_allclose(sample.boxes_cxcywh_T4, [[20 / 80, 20 / 60, 20 / 80, 20 / 60]], rtol=1e-6)
    assert sample.boxes_cxcywh_T4.dtype == np.float32
    rows, columns = np.nonzero(masks(sample)[0])
    assert (columns.min(), columns.max() + 1) == (8, 24)
    assert (rows.min(), rows.max() + 1) == (11, 32)


def test_targets_are_packed_in_query_order(folder):
    path = folder.write(
        [
            annotation(0, category_id=2, bbox=[10, 10, 10, 20]),
            annotation(1, category_id=1),
            annotation(2, category_id=2, bbox=[10, 10, 40, 20]),
        ],
        categories=(("crack", 1), ("root", 2), ("weed", 3)),
    )
    sample = decode(path, names=("crack", "root", "weed"))
    assert sample.prompts_B == ["crack", "root", "weed"]
    assert sample.num_B.tolist() == [1, 2, 0]
    # every object keeps its own class: the boxes of objects 1, 0 and 2
    assert sample.boxes_cxcywh_T4[:, 2].tolist() == [0.25, 0.125, 0.5]


def test_objects_without_a_usable_mask_keep_their_box(folder):
    path = folder.write(
        [
            annotation(0, segmentation=[]),
            # a sliver of a tenth of a pixel vanishes at 64 x 64
            annotation(1, bbox=[10, 10, 0.1, 20], segmentation=[[10.3, 10, 10.4, 10, 10.4, 30, 10.3, 30]]),
            annotation(2),
        ]
    )
    sample = decode(path)
    assert len(sample.boxes_cxcywh_T4) == 3
    assert sample.mask_valid_T.tolist() == [False, False, True]
    assert masks(sample).any(axis=(1, 2)).tolist() == [False, False, True]
    boxes_only = decode(path, mask_size=None)
    assert boxes_only.masks_packed is None
    assert not boxes_only.mask_valid_T.any()


def test_max_objects_keeps_a_reproducible_subset(folder):
    path = folder.write([annotation(i, bbox=[10, 10, 20 + i, 20]) for i in range(9)])
    assert decode(path).num_B.tolist() == [9]
    first, second = decode(path, max_objects=4), decode(path, max_objects=4)
    assert first.num_B.tolist() == [4]
    assert first.boxes_cxcywh_T4.tolist() == second.boxes_cxcywh_T4.tolist()
    assert first.boxes_cxcywh_T4.tolist() != decode(path, max_objects=4, seed=1).boxes_cxcywh_T4.tolist()
    # the objects left out are there: the query no longer has all
    assert (first.exhaustive_B.tolist(), decode(path).exhaustive_B.tolist()) == ([False], [True])


def test_objects_too_small_to_match_make_a_query_incomplete():
    objects = [{"bbox_xywh": [10, 10, side, side]} for side in (20, 0.01)]
    record = {"height": 60, "width": 80, "annotations": objects}
    rng, query = np.random.default_rng(0), Query("crack", "crack", (0, 1), is_positive=True)
    assert matched_objects(record, [query], None, rng) == [(replace(query, is_exhaustive=False), [0])]
    [(whole, rows)] = matched_objects(record, [replace(query, annotation_rows=(0,))], None, rng)
    assert (whole.is_exhaustive, rows) == (True, [0])


def test_the_real_size_wins_and_coordinates_stay_relative(folder):
    # the file says 160 x 120, the image has 80 x 60
    images = [{"id": 0, "file_name": "0.png", "width": 160, "height": 120}]
    big = decode(folder.write([annotation(0, bbox=[20, 20, 40, 40], segmentation=[square(20, 20, 40)])], images=images))
    small = decode(folder.write([annotation(0)]))
    assert big.original_sizes_hw.tolist() == [[60, 80]]
    assert np.array_equal(big.boxes_cxcywh_T4, small.boxes_cxcywh_T4)
    assert np.array_equal(big.masks_packed, small.masks_packed)


def test_flip_mirrors_boxes_and_masks(folder):
    path = folder.write([annotation(0)])
    plain, flipped = decode(path), decode(path, horizontal_flip=1.0)
    assert np.array_equal(flipped.images_NHWC, plain.images_NHWC[:, :, ::-1])
    assert flipped.boxes_cxcywh_T4[0, 0] == pytest.approx(1 - plain.boxes_cxcywh_T4[0, 0])
    assert np.array_equal(masks(flipped)[0], masks(plain)[0][:, ::-1])


def test_a_broken_image_in_the_middle(folder):
    path = folder.write([annotation(i, image_id=i) for i in range(4)], num_images=4)
    (path / "2.png").write_bytes(b"no image")
    index = CocoIndex.from_folder(path)
    plans = list(plan_run(4, images_per_step=2, num_epochs=1, shuffle=False))
    stop = DecodeSettings(names=index.names, resolution=32, mask_size=32)
    with pytest.raises(ImageError, match=r"2\.png.* Repair or remove it, or set training\.on_bad_image=skip"):
        list(iterate_batches(index.table, plans, stop))
    skip = DecodeSettings(names=index.names, resolution=32, mask_size=32, on_bad_image="skip")
    first, second = iterate_batches(index.table, plans, skip)
    assert first.skipped == []
    assert second.image_ids.tolist() == [3]
    assert second.skipped == [(2, str(path / "2.png"), "no known image format")]


def test_rows_with_queries_leaves_out_what_cannot_be_asked(folder):
    path = folder.write([annotation(0), annotation(1, image_id=1, iscrowd=1)], num_images=3)
    index = CocoIndex.from_folder(path)
    # image 1 shows a crowd of the only category; image 2 is a true negative, if annotation is exhaustive
    assert rows_with_queries(index.table, DecodeSettings(names=index.names)) == [0, 2]
    assert rows_with_queries(index.table, DecodeSettings(names=index.names, exhaustive=False)) == [0]
