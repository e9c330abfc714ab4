"""Batch runs whose model fails: out of memory, one image, the device."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sam3lora.inference.batch import worker as worker_module
from sam3lora.inference.batch.image_list import list_images
from sam3lora.inference.batch.merge import write_bad_images, write_predictions
from sam3lora.inference.batch.output_folder import part_path, read_part, read_parts
from sam3lora.inference.batch.worker import ModelChoice, ShardWorker, WorkerSettings

from .batch_cases import POST, PROMPTS, begin
from .test_batch_job import row

WHITE = 255  # the image on which the model fails


@pytest.fixture
def shard(small_base: Path, tmp_path: Path):
    """A worker with batches of four, and five images of one colour each, the last one white."""
    begin(tmp_path / "out", {})
    (tmp_path / "images").mkdir()
    for number, value in enumerate((10, 20, 30, 40, WHITE)):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), np.full((40, 60, 3), value, np.uint8))
    settings = WorkerSettings(
        output=tmp_path / "out",
        input_root=tmp_path,
        run="run",
        choice=ModelChoice(str(small_base)),
        categories=PROMPTS,
        post=POST,
        batch_size=5,
        overlays=False,
        base_fingerprint=None,
    )
    return ShardWorker(settings), list_images(tmp_path / "images", leave_out=tmp_path / "out").images


def fail(monkeypatch, worker: ShardWorker, error: Exception, *, above: int = 99, white: bool = False) -> list[int]:
    """The model raises for more images than `above`, or for a batch with the white one. Returns the sizes asked."""
    detect, sizes = worker._asker.pool.detect, []

    def failing(images, *args, **options):
        sizes.append(len(images))
        if len(images) > above or (white and any(image.min() == WHITE for image in images)):
            raise error
        return detect(images, *args, **options)

    monkeypatch.setattr(worker._asker.pool, "detect", failing)
    return sizes


def records(tmp_path: Path) -> list[dict]:
    return read_part(part_path(tmp_path / "out", "run", 0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_halves_the_batch_and_loses_nothing(error, shard, tmp_path, monkeypatch):
    worker, images = shard
    whole = worker(row(images))
    expected = records(tmp_path)
    part_path(tmp_path / "out", "run", 0).unlink()
    sizes = fail(monkeypatch, worker, error, above=2)
    assert worker(row(images)) == whole == {"mistake": "", "failure": "", "num_images": 5, "num_bad": 0}
    assert sizes == [5, 2, 3, 1, 2]
    found = records(tmp_path)
    assert [record["path"] for record in found] == [image.path for image in images]
    assert [len(record["detections"]) for record in found] == [len(record["detections"]) for record in expected]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out for this image alone"),
        (ValueError("outputs are not finite"), "ValueError: outputs are not finite"),
    ],
)
def test_one_failing_image_is_named_and_the_rest_is_done(error, reason, shard, tmp_path, monkeypatch):
    worker, images = shard
    fail(monkeypatch, worker, error, white=True)
    assert worker(row(images)) == {"mistake": "", "failure": "", "num_images": 5, "num_bad": 1}
    finished = read_parts(tmp_path / "out")
    (bad,) = write_bad_images(tmp_path / "bad.json", images, finished)
    assert (bad["file_name"], bad["reason"]) == ("4.png", reason)
    assert write_predictions(tmp_path / "found.json", images, finished) == 4 * len(PROMPTS) * POST.max_detections


class EndedError(Exception):
    """In place of the end of the process."""


def test_a_device_error_ends_the_worker_without_a_result(shard, tmp_path, monkeypatch):
    # Another worker takes the shard: no image may be blamed for what came before it.
    worker, images = shard
    sizes = fail(monkeypatch, worker, RuntimeError("CUDA error: device-side assert triggered"), above=0)

    def end(_status):
        raise EndedError

    monkeypatch.setattr(worker_module.os, "_exit", end)
    with pytest.raises(EndedError):
        worker(row(images))
    assert sizes == [5]
    assert not read_parts(tmp_path / "out").places
