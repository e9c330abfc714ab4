"""How many images fit in one forward: measured on the run's own model, settings and hardware before it starts."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor

from sam3lora.config import Config
from sam3lora.config.training import images_per_step
from sam3lora.data.batch import Batch, to_pixel_values
from sam3lora.data.sample import record_queries
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
"""Of the memory that is free: a CPU's is shared with what decodes images."""


def resolve_batch_size(config: Config, model: PeftModel, runner: LossRunner, data: RunData) -> Config:
    """The configuration with a number in place of `training.batch_size: auto`, the same on all workers.

    The step stays `training.images_per_step` images, whatever fits. So a run that goes on measures anew.

    Raises:
        OutOfMemory: One image does not fit on some worker.
    """
    training = config.training
    if training.batch_size != "auto":
        return config
    divisors = [size for size in range(1, images_per_step(training) + 1) if images_per_step(training) % size == 0]
    backward = _Backward(model, runner, data, model_dropout=training.model_dropout)
    share = 1 / _workers_on(runner.device)
    if runner.device.type == "cuda":
        fits = _fitting_on_gpu(backward, divisors, GPU_SHARE * share)
    else:
        fits = _fitting_on_cpu(backward, divisors, CPU_SHARE * share)
    size = min(distributed.gather_objects(fits))
    if size == 0:
        raise OutOfMemory(
            "out of memory with one image at a time: lower training.max_prompts_per_forward or model.resolution, or "
            "set training.gradient_checkpointing to true"
        )
    return config.model_copy(update={"training": training.with_images_per_forward(size)})


@dataclass
class _Backward:
    """`backward(n)`: the gradients of n images of the costliest kind, and nothing of it left behind.

    Random pixels; each image is asked as often, and shows as many objects, as any image of the split.
    """

    model: PeftModel
    runner: LossRunner
    data: RunData
    model_dropout: bool

    def __post_init__(self) -> None:
        self._num_queries, self._num_objects = _most_queries_and_objects(self.data)
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
        num_B = torch.tensor(num_of_query * num_images)
        num_targets, mask_size = int(num_B.sum()), settings.mask_size
        generator = torch.Generator().manual_seed(0)
        side = settings.resolution
        pixels = torch.randint(0, 256, (num_images, side, side, 3), dtype=torch.uint8, generator=generator)
        boxes = torch.rand(num_targets, 4, generator=generator) * 0.25 + 0.25
        packed = None
        if mask_size is not None:
            num_bytes = -(-mask_size * mask_size // 8)
            packed = torch.randint(0, 256, (num_targets, num_bytes), dtype=torch.uint8, generator=generator)
        return Batch(
            images_NHWC=pixels,
            image_rows_N=torch.arange(num_images),
            feature_keys_I=[None] * num_images,
            image_ids=torch.arange(num_images),
            query_image_B=torch.arange(num_images).repeat_interleave(queries),
            # Other prompts on every image, as far as there are any: an adapted text tower sees each once.
            prompts_B=[self.data.prompts[row % len(self.data.prompts)] for row in range(queries * num_images)],
            categories_B=[None] * (queries * num_images),
            is_positive_B=num_B > 0,
            num_B=num_B,
            boxes_cxcywh_T4=boxes,
            masks_packed=packed,
            mask_size=mask_size,
            mask_valid_T=torch.full((num_targets,), packed is not None),
            annotation_ids_T=torch.arange(num_targets),
            original_sizes_hw=torch.full((num_images, 2), side),
            paths=[""] * num_images,
            skipped=[],
            epoch=0,
            step=0,
        )


@dataclass
class _NoiseEncoder:
    """Does with a batch's images what training does with images it has seen before, and keeps nothing of them."""

    encoder: ImageEncoder
    from_cache: bool

    def of_batch(self, batch: Batch) -> VisionFeatures:
        encoder = self.encoder
        dtype = next(encoder.staged.model.vision_encoder.parameters()).dtype

        def pixel_values(rows: slice) -> Tensor:
            return to_pixel_values(batch.images_NHWC[rows], encoder.device, dtype)

        if not self.from_cache or encoder.trunk is None:
            with torch.set_grad_enabled(encoder.trainable):
                return encoder.staged.encode_images(pixel_values(slice(None)))
        tokens_ISC = encoder.trunk.fetch([None] * batch.num_images, lambda row: pixel_values(slice(row, row + 1)))
        with torch.set_grad_enabled(encoder.trainable):
            return encoder.trunk.features(tokens_ISC)


def _most_queries_and_objects(data: RunData) -> tuple[int, int]:
    """Of any image of the training split, in its first epoch."""
    most_queries = most_objects = 1
    limit = data.train_settings.max_objects or 10**9
    for record in data.train.table.to_pylist():
        queries = record_queries(record, data.train_settings)
        most_queries = max(most_queries, len(queries))
        most_objects = max(most_objects, sum(min(limit, len(query.annotation_rows)) for query in queries))
    return most_queries, most_objects


def _workers_on(device: torch.device) -> int:
    """How many workers share this device's memory."""
    name = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else "cpu"
    mine = (socket.gethostname(), str(name))
    return distributed.gather_objects(mine).count(mine)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def _fitting_on_gpu(backward: Callable[[int], None], sizes: list[int], share: float) -> int:
    """The largest size, tried from the smallest up, that takes no more than a share of the memory; 0 for none."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    allowed = before + share * torch.cuda.mem_get_info()[0]
    fits = 0
    for size in sizes:
        torch.cuda.reset_peak_memory_stats()
        try:
            backward(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if torch.cuda.max_memory_reserved() > allowed:
            break
        fits = size
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return fits


# ---- on a CPU -------------------------------------------------------------------------------------------------------


def _fitting_on_cpu(backward: Callable[[int], None], sizes: list[int], share: float) -> int:
    """The largest size within a share of the memory, judged by the peaks of one and of two images; at least 1.

    A CPU's memory has no bound that fails cleanly, so no more is tried.
    """
    available = available_bytes()
    if available is None or not _can_measure_peaks():
        logger.warning("training.batch_size is auto, but this system does not tell its memory: 1 image at a time")
        return 1
    allowed = _status(_OWN_STATUS)["VmRSS"] + share * available
    backward(1)  # what the first pass alone allocates
    one, two = (_peak_bytes(backward, num_images) for num_images in (1, 2))
    return fitting(sizes, one, max(two - one, 0), allowed)


def fitting(sizes: list[int], one: float, more: float, allowed: float) -> int:
    """The largest of the sizes, at least the first, of which `one` + (size - 1) x `more` bytes are allowed."""
    return max((size for size in sizes if one + (size - 1) * more <= allowed), default=sizes[0])


def available_bytes() -> int | None:
    """Memory that this process may still take, of the machine and of its control group; None if nothing tells."""
    found = [_status(Path("/proc/meminfo")).get("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        pages = (group / "memory.stat").read_text(encoding="ascii").split("inactive_file ")[1].split()[0]
        found.append(limit - used + int(pages))  # cached files make way
    known = [value for value in found if value is not None]
    return max(min(known), 0) if known else None


def _peak_bytes(backward: Callable[[int], None], num_images: int) -> int:
    """The most that was resident meanwhile."""
    _FORGET_PEAK.write_text("5", encoding="ascii")
    backward(num_images)
    return _status(_OWN_STATUS)["VmHWM"]


def _can_measure_peaks() -> bool:
    return "VmHWM" in _status(_OWN_STATUS) and os.access(_FORGET_PEAK, os.W_OK)


def _status(path: Path) -> dict[str, int]:
    """Values in bytes of a file with lines such as `VmRSS: 1024 kB`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {word[0].rstrip(":"): int(word[1]) * 1024 for word in words if len(word) == 3 and word[2] == "kB"}
