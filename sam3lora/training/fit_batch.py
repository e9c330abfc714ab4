"""`training.batch_size: auto`: how many images fit in one forward, measured on the run's own model and hardware."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel
from torch import Tensor

from sam3lora.config import Config
from sam3lora.data.batch import Batch
from sam3lora.data.coco import read_record
from sam3lora.data.index_columns import object_columns
from sam3lora.data.prompts import ALL_NEGATIVES, incomplete_prompts, prompt_key
from sam3lora.data.sample import DecodeSettings, record_queries
from sam3lora.engine.device import is_out_of_memory
from sam3lora.errors import OutOfMemory
from sam3lora.model.staged.forward import VisionFeatures
from sam3lora.training import distributed
from sam3lora.training.datasets import RunData
from sam3lora.training.features.encoder import ImageEncoder
from sam3lora.training.optimization import set_training_mode
from sam3lora.training.step import LossRunner, StepCounts

logger = logging.getLogger(__name__)

_OWN_STATUS, _FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GPU_SHARE, CPU_SHARE = 0.9, 0.7
"""Shares of the free memory that a run may take. On a CPU, decoding of images needs the rest."""


def resolve_batch_size(
    config: Config, model: PeftModel, runner: LossRunner, data: RunData, images_per_step: int
) -> Config:
    """The configuration with a number in place of `training.batch_size: auto`, the same on all workers.

    The step stays `images_per_step` images over all workers, whatever fits, so a resumed run may measure again.

    Raises:
        OutOfMemory: One image does not fit on some worker.
    """
    training = config.training
    if training.batch_size != "auto":
        return config
    share = -(-images_per_step // distributed.world_size())
    sizes = sorted(
        {-(-share // forwards) for forwards in range(1, share + 1)}
    )  # each with fewer forwards than the last
    backward = _Backward(model, runner, data, model_dropout=training.model_dropout)
    workers = _workers_on(runner.device)
    if runner.device.type == "cuda":
        fits = _fitting_on_gpu(backward, sizes, GPU_SHARE / workers)
    else:
        fits = _fitting_on_cpu(backward, sizes, CPU_SHARE / workers)
    size = min(distributed.gather_objects(fits))
    if size == 0:
        raise OutOfMemory(
            "out of memory with one image at a time: lower training.max_prompts_per_forward or model.resolution, or "
            "set training.gradient_checkpointing to true"
        )
    return config.changed({"training.batch_size": size})


@dataclass
class _Backward:
    """`backward(n)` computes the gradients of n images of the costliest kind and discards them.

    The pixels are random. Each image has as many queries and objects as the image of the split that has most of them.
    """

    model: PeftModel
    runner: LossRunner
    data: RunData
    model_dropout: bool

    def __post_init__(self) -> None:
        self._num_queries, self._num_objects = most_queries_and_objects(self.data.train.table, self.data.train_settings)
        images = cast(ImageEncoder, _NoiseEncoder(self.runner.images, self.data.train_settings.features is not None))
        self._runner = replace(self.runner, images=images)

    def __call__(self, num_images: int) -> None:
        batch = self._batch(num_images)
        set_training_mode(self.model, model_dropout=self.model_dropout)
        device = self.runner.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            try:
                self._runner.backward(batch, StepCounts.of([batch]).normalizer())
            finally:
                self.model.zero_grad(set_to_none=True)
                self.model.eval()

    def _batch(self, num_images: int) -> Batch:
        """Objects are spread evenly over the queries of their image."""
        settings, queries, objects = self.data.train_settings, self._num_queries, self._num_objects
        num_of_query = [objects // queries + (query < objects % queries) for query in range(queries)]
        num_B = np.array(num_of_query * num_images, dtype=np.int64)
        num_targets, mask_size, side = int(num_B.sum()), settings.mask_size, settings.resolution
        rng = np.random.default_rng(0)
        packed = None
        if mask_size is not None:
            packed = rng.integers(0, 256, (num_targets, -(-mask_size * mask_size // 8)), dtype=np.uint8)
        return Batch(
            images_NHWC=rng.integers(0, 256, (num_images, side, side, 3), dtype=np.uint8),
            image_rows_N=np.arange(num_images),
            feature_keys_I=[None] * num_images,
            image_ids=np.arange(num_images),
            paths=[""] * num_images,
            original_sizes_hw=np.full((num_images, 2), side),
            query_image_B=np.repeat(np.arange(num_images), queries),
            # Different prompts on every image, as far as there are any: an adapted text tower encodes each one once.
            prompts_B=[self.data.prompts[row % len(self.data.prompts)] for row in range(queries * num_images)],
            num_B=num_B,
            exhaustive_B=np.ones(len(num_B), dtype=bool),
            boxes_cxcywh_T4=rng.uniform(0.25, 0.5, (num_targets, 4)).astype(np.float32),
            masks_packed=packed,
            mask_size=mask_size,
            mask_valid_T=np.full(num_targets, packed is not None),
            skipped=[],
        )


@dataclass
class _NoiseEncoder:
    """Encodes a batch's images as `ImageEncoder` does for images it has seen before, without writing to its cache."""

    encoder: ImageEncoder
    from_cache: bool

    def of_batch(self, batch: Batch) -> VisionFeatures:
        encoder = self.encoder

        def pixel_values(row: int) -> Tensor:
            return encoder.pixel_values(batch.images_NHWC[row : row + 1])

        if not self.from_cache or encoder.trunk is None:
            with torch.set_grad_enabled(encoder.trainable):
                return encoder.staged.encode_images(encoder.pixel_values(batch.images_NHWC))
        tokens_ISC = encoder.trunk.fetch([None] * batch.num_images, pixel_values)
        with torch.set_grad_enabled(encoder.trainable):
            return encoder.trunk.features(tokens_ISC)


def most_queries_and_objects(table: pa.Table, settings: DecodeSettings) -> tuple[int, int]:
    """The largest numbers of queries and of objects to match of any image in an epoch; at least 1."""
    prompts = {prompt_key(name): prompt for name, prompt in settings.prompts_map.items()}

    def key_of(category: str) -> str:
        return prompt_key(prompts.get(prompt_key(category), category))

    objects = object_columns(table)
    rows, _, num_of_query, _ = objects.count_pairs(key_of, ~objects.crowd_T)
    if settings.max_objects is not None:
        num_of_query = np.minimum(num_of_query, settings.max_objects)
    num_objects_I = np.bincount(rows, num_of_query, minlength=objects.num_images)
    # What an image shows is asked first, then negatives of what it is known not to show, as far as there are any.
    num_positives_I = np.bincount(rows, minlength=objects.num_images)
    incomplete = incomplete_prompts(settings.names, settings.prompts_map, settings.exhaustive)
    complete = {key_of(name) for name in settings.names} - incomplete
    shown_rows, positions, _, keys = objects.count_pairs(key_of)
    is_complete = np.array([key in complete for key in keys], dtype=bool)
    num_shown_I = np.bincount(shown_rows[is_complete[positions]], minlength=objects.num_images)
    num_absent_I = len(complete) - num_shown_I
    sampled = settings.num_negatives
    every_one = sampled is None or sampled == ALL_NEGATIVES
    num_negatives_I = num_absent_I if every_one else np.minimum(num_absent_I, sampled or 0)
    row = int((num_positives_I + num_negatives_I).argmax())
    queries = record_queries(read_record(table, row), settings)
    return max(1, len(queries)), max(1, int(num_objects_I.max()))


def _workers_on(device: torch.device) -> int:
    """How many workers share this device's memory."""
    name = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else "cpu"
    mine = (socket.gethostname(), str(name))
    return distributed.gather_objects(mine).count(mine)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def _fitting_on_gpu(backward: Callable[[int], None], sizes: list[int], share: float) -> int:
    """The largest size that takes no more than a share of the free memory; 0 for none."""
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + share * torch.cuda.mem_get_info()[0]

    def peak_bytes(size: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        backward(size)
        return torch.cuda.max_memory_reserved()

    fits = largest_that_fits(sizes, peak_bytes, allowed)
    gc.collect()  # after a failure, cycles of the recomputed graph hold tensors that could not be given back otherwise
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return fits


def largest_that_fits(sizes: list[int], peak_bytes: Callable[[int], int], allowed: float) -> int:
    """The largest size of which no more than `allowed` bytes are measured; 0 for none.

    Sizes are tried in their order up to the first that takes too much or runs out of memory.
    """
    fits = 0
    for size in sizes:
        try:
            if peak_bytes(size) > allowed:
                break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        fits = size
    return fits


# ---- on a CPU -------------------------------------------------------------------------------------------------------


def _fitting_on_cpu(backward: Callable[[int], None], sizes: list[int], share: float) -> int:
    """The largest size within a share of the memory, judged by the peaks of one and of two images; at least 1.

    Running out of memory on a CPU may end the process, so no larger size is tried.
    """
    available = available_bytes()
    if available is None or "VmHWM" not in _status(_OWN_STATUS) or not os.access(_FORGET_PEAK, os.W_OK):
        logger.warning("training.batch_size is auto, but the free memory of this system is unknown: 1 image at a time")
        return 1
    allowed = _status(_OWN_STATUS)["VmRSS"] + share * available
    backward(1)  # the first pass makes allocations of its own
    one, two = (_peak_bytes(backward, num_images) for num_images in (1, 2))
    return fitting(sizes, one, max(two - one, 0), allowed)


def fitting(sizes: list[int], one: float, more: float, allowed: float) -> int:
    """The largest of the sizes, at least the first, of which `one` + (size - 1) x `more` bytes are allowed."""
    return max((size for size in sizes if one + (size - 1) * more <= allowed), default=sizes[0])


def available_bytes() -> int | None:
    """Memory that the machine and the control group still allow this process; None if unknown."""
    found = [_status(Path("/proc/meminfo")).get("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        pages = (group / "memory.stat").read_text(encoding="ascii").split("inactive_file ")[1].split()[0]
        found.append(limit - used + int(pages))  # the memory of cached files can be reclaimed
    known = [value for value in found if value is not None]
    return max(min(known), 0) if known else None


def _peak_bytes(backward: Callable[[int], None], num_images: int) -> int:
    """The largest resident memory during a backward pass."""
    _FORGET_PEAK.write_text("5", encoding="ascii")
    backward(num_images)
    return _status(_OWN_STATUS)["VmHWM"]


def _status(path: Path) -> dict[str, int]:
    """Values in bytes of a file with lines such as `VmRSS: 1024 kB`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {word[0].rstrip(":"): int(word[1]) * 1024 for word in words if len(word) == 3 and word[2] == "kB"}
