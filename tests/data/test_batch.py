"""Batches as arrays, and their tensors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from sam3lora.data.batch import Batch, to_pixel_values
from sam3lora.data.coco import CocoIndex
from sam3lora.data.pipeline import decode_batch
from sam3lora.data.plan import BatchPlan
from sam3lora.data.sample import DecodeSettings
from sam3lora.engine import features

from .coco_builder import annotation

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.5, 0.7)


@pytest.fixture
def make(folder):
    """`make([0, 1])` -> a batch of these rows: image 0 has two objects, image 1 has one, image 2 none."""

    def decode(rows, **changes) -> Batch:
        path = folder.write([annotation(0), annotation(1), annotation(2, image_id=1)], num_images=3)
        index = CocoIndex.from_folder(path)
        settings = DecodeSettings(**{"names": index.names, "resolution": 32, "mask_size": 21, **changes})
        return decode_batch(index.table, BatchPlan(4, 7, rows), settings)

    return decode


def test_queries_and_targets_of_several_images(make):
    batch = make([0, 1, 2])
    assert (batch.num_images, batch.num_queries, batch.epoch, batch.step) == (3, 3, 4, 7)
    assert batch.images_NHWC.shape == (3, 32, 32, 3)
    assert batch.image_rows_N.tolist() == batch.query_image_B.tolist() == [0, 1, 2]
    assert batch.num_B.tolist() == [2, 1, 0]
    assert batch.query_T.tolist() == [0, 0, 1]
    assert batch.num_semantic == 2
    batch.mask_valid_T[2] = False
    assert batch.num_semantic == 1
    assert make([0], mask_size=None).num_semantic == 0


def test_pixels_are_normalised_as_in_inference():
    # Equal bits for every pixel value and any mean and standard deviation.
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    for mean, std in ((MEAN, STD), ((0.5,) * 3, (0.5,) * 3)):
        expected = features.to_pixel_values(list(images), 16, image_mean=mean, image_std=std)
        found = to_pixel_values(images, mean, std)
        assert torch.equal(found, expected)
        assert found.is_contiguous()
    assert to_pixel_values(images, MEAN, STD, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_targets_fit_the_criterion(make):
    targets = make([0, 1]).targets()
    assert targets.num_B.tolist() == [2, 1]
    assert targets.boxes_cxcywh_T4.shape == (3, 4)
    assert (targets.masks_THW.shape, targets.masks_THW.dtype) == ((3, 21, 21), torch.bool)
    assert targets.mask_valid_T.all()
    assert make([0], mask_size=None).targets().masks_THW is None


def test_targets_of_some_queries(make):
    # Each query takes its own rows, whatever its neighbours have.
    batch = make([0, 1, 2, 0], exhaustive=False, negative_prompts=("zebra",))
    assert batch.num_B.tolist() == [2, 0, 1, 0, 0, 2, 0]
    assert batch.exhaustive_B.tolist() == [False, True, False, True, True, False, True]
    whole = batch.targets()
    assert whole.exhaustive_B.tolist() == batch.exhaustive_B.tolist()
    part = batch.targets(queries=slice(2, 6))
    assert part.num_B.tolist() == [1, 0, 0, 2]
    assert part.exhaustive_B.tolist() == [False, True, True, False]
    assert torch.equal(part.boxes_cxcywh_T4, whole.boxes_cxcywh_T4[2:])
    assert torch.equal(part.masks_THW, whole.masks_THW[2:])
    # without an incomplete query the loss has nothing to leave out
    assert batch.targets(queries=slice(3, 5)).exhaustive_B is None
    assert len(batch.targets(queries=slice(3, 5)).boxes_cxcywh_T4) == 0


def test_empty_batch(folder):
    path = folder.write([annotation(0)])
    (path / "0.png").write_bytes(b"")
    index = CocoIndex.from_folder(path)
    settings = DecodeSettings(names=index.names, resolution=32, mask_size=16, on_bad_image="skip")
    batch = decode_batch(index.table, BatchPlan(0, 0, [0]), settings)
    assert to_pixel_values(batch.images_NHWC, MEAN, STD).shape == (0, 3, 32, 32)
    assert batch.masks().shape == (0, 16, 16)
    assert (batch.num_images, batch.num_queries, batch.num_semantic, len(batch.skipped)) == (0, 0, 0, 1)


def test_decoding_imports_no_torch():
    # Data workers stay light.
    modules = "batch, check, coco, pipeline, plan, sample"
    code = f"import sys; from sam3lora.data import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pinning_copies_every_array_and_keeps_the_rest(make, monkeypatch):
    # Without a GPU no memory can be pinned, so copies stand for it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    batch = make([0, 1, 2])
    pinned = batch.pin_memory()
    for name, value in vars(batch).items():
        other = getattr(pinned, name)
        if isinstance(value, np.ndarray):
            assert np.array_equal(other, value), name
            assert not np.shares_memory(other, value), name
        else:
            assert other is value, name


def test_masks_are_unpacked_alike_on_every_device(make):
    # A side of 21 does not fill the last byte.
    batch = make([0, 1, 2])
    bits = np.unpackbits(batch.masks_packed, axis=1)[:, : 21 * 21].reshape(-1, 21, 21)
    assert torch.equal(batch.masks(), torch.from_numpy(bits.astype(bool)))
    there = batch.masks("meta")
    assert (there.shape, there.dtype) == (batch.masks().shape, torch.bool)
