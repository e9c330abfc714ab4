"""Tensors of a batch: the same numbers as the decoded arrays."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from sam3lora.data.batch import collate
from sam3lora.data.coco import CocoIndex
from sam3lora.data.pipeline import iterate_batches
from sam3lora.data.plan import BatchPlan
from sam3lora.data.sample import DecodeSettings

from .coco_builder import annotation


def make(folder, rows, **changes):
    path = folder.write([annotation(0), annotation(1), annotation(2, image_id=1)], num_images=3)
    index = CocoIndex.from_folder(path)
    settings = DecodeSettings(**{"names": index.names, "resolution": 32, "mask_size": 21, **changes})
    return next(iterate_batches(index.table, [BatchPlan(4, 7, rows)], settings))


def test_batch_has_the_arrays_of_the_samples(folder):
    raw = make(folder, [0, 1, 2])
    batch = collate(raw)
    assert (batch.num_images, batch.num_queries, batch.epoch, batch.step) == (3, 3, 4, 7)
    assert batch.query_image_B.tolist() == [0, 1, 2]
    assert batch.num_B.tolist() == [2, 1, 0]
    assert batch.is_positive_B.tolist() == [True, True, False]
    # a side of 21 does not fill the last byte
    bits = np.unpackbits(raw["masks_packed"], axis=1)[:, : 21 * 21].reshape(-1, 21, 21)
    assert torch.equal(batch.masks(), torch.from_numpy(bits.astype(bool)))


def test_pixels_are_normalised_as_the_processor_does(folder):
    raw = make(folder, [0])
    expected = (torch.from_numpy(raw["images"]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    pixels = collate(raw).pixel_values()
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert pixels.is_contiguous()
    assert collate(raw).pixel_values(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_targets_fit_the_criterion(folder):
    targets = collate(make(folder, [0, 1])).targets()
    assert targets.num_B.tolist() == [2, 1]
    assert targets.boxes_cxcywh_T4.shape == (3, 4)
    assert (targets.masks_THW.shape, targets.masks_THW.dtype) == ((3, 21, 21), torch.bool)
    assert targets.mask_valid_T.all()
    assert collate(make(folder, [0], mask_size=None)).targets().masks_THW is None


def test_empty_batch(folder):
    path = folder.write([annotation(0)])
    (path / "0.png").write_bytes(b"")
    index = CocoIndex.from_folder(path)
    settings = DecodeSettings(names=index.names, resolution=32, mask_size=16, on_bad_image="skip")
    batch = collate(next(iterate_batches(index.table, [BatchPlan(0, 0, [0])], settings)))
    assert batch.pixel_values().shape == (0, 3, 32, 32)
    assert batch.masks().shape == (0, 16, 16)
    assert (batch.num_queries, len(batch.skipped)) == (0, 1)


def test_decoding_imports_no_torch():
    # data workers stay light
    modules = "check, coco, pipeline, plan, sample"
    code = f"import sys; from sam3lora.data import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pinned_batch_has_every_tensor_pinned_and_the_rest_as_it_was(folder, monkeypatch):
    # Without a GPU no memory can be pinned: copies stand for it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    batch = collate(make(folder, [0, 1, 2]))
    pinned = batch.pin_memory()
    for name, value in vars(batch).items():
        other = getattr(pinned, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
            assert other.data_ptr() != value.data_ptr(), name
        else:
            assert other is value, name


def test_masks_are_unpacked_alike_on_every_device(folder):
    batch = collate(make(folder, [0, 1, 2]))
    there = batch.masks("meta")
    assert (there.shape, there.dtype) == (batch.masks().shape, torch.bool)
    bits = batch.masks_packed.unsqueeze(-1) >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
    assert torch.equal(batch.masks().flatten(1), bits.flatten(1)[:, : 21 * 21].bool())
