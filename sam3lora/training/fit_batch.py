"""`auto` for `training.batch_size` and `training.max_prompts_per_forward`: what fits in one forward of this run."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sam3lora.config import Config
from sam3lora.errors import OutOfMemory
from sam3lora.training import distributed
from sam3lora.training.datasets import RunData
from sam3lora.training.forward_sizes import (
    allowed_on_gpu,
    image_sizes,
    largest_that_fits,
    peak_on_gpu,
    prompt_sizes,
    prompts_on_cpu,
)
from sam3lora.training.task import CostliestBackward, Runner, Task

logger = logging.getLogger(__name__)

_OWN_STATUS, _FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CPU_SHARE = 0.7
"""Of the free memory, that a run may take: decoding of images needs the rest."""


def resolve_forward_size(
    config: Config, task: Task, model: nn.Module, runner: Runner, data: RunData, images_per_step: int
) -> Config:
    """The configuration with numbers in place of `auto`, the same on all workers.

    On a GPU both are measured with the run's own model and the costliest images of its split. On a CPU the number of
    images is, and the number of prompts follows from their size. The step stays `images_per_step` images over all
    workers and its gradient the same, whatever fits, so a resumed run may measure again.

    Raises:
        OutOfMemory: The smallest forward does not fit on some worker.
    """
    on_gpu = runner.device.type == "cuda"
    if config.training.max_prompts_per_forward == "auto" and not on_gpu:
        number = prompts_on_cpu(data.train_settings.resolution) if task.asks_prompts else 1
        config = config.changed({"training.max_prompts_per_forward": number})
    training = config.training
    if "auto" not in (training.batch_size, training.max_prompts_per_forward):
        return config
    share = -(-images_per_step // distributed.world_size())
    images = image_sizes(share) if training.batch_size == "auto" else [min(training.batch_size, share)]
    backward = task.costliest(model, runner, data, model_dropout=training.model_dropout)
    workers = _workers_on(runner.device)
    if on_gpu:
        most = images[-1] * backward.num_queries
        given = training.max_prompts_per_forward
        prompts = prompt_sizes(most if task.asks_prompts else 1) if given == "auto" else [given]
        allowed = allowed_on_gpu(workers, config.scaling.resources_per_worker.get("GPU", 1.0))
        fits = _fitting_on_gpu(backward, images, prompts, allowed)
    else:
        number = training.prompts_per_forward
        fits = _fitting_on_cpu(partial(backward, max_prompts=number), images, CPU_SHARE / workers), number
    size, number = (min(numbers) for numbers in zip(*distributed.gather_objects(fits), strict=True))
    if size == 0:
        raise OutOfMemory(_nothing_fits(config))
    chosen = {"batch_size": size, "max_prompts_per_forward": number}
    return config.changed({f"training.{name}": n for name, n in chosen.items() if getattr(training, name) == "auto"})


def _nothing_fits(config: Config) -> str:
    written = {f"training.{name}": getattr(config.training, name) for name in ("batch_size", "max_prompts_per_forward")}
    written = {name: number for name, number in written.items() if number not in ("auto", 1)}
    at_all = " and ".join(f"{name}={number}" for name, number in written.items()) or "one image and one prompt"
    return (
        f"out of memory with {at_all} at a time: lower {', '.join([*written, 'model.resolution'])}, or set "
        "training.gradient_checkpointing to true"
    )


def _workers_on(device: torch.device) -> int:
    """How many workers share this device's memory."""
    name = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else "cpu"
    mine = (socket.gethostname(), str(name))
    return distributed.gather_objects(mine).count(mine)


def _fitting_on_gpu(
    backward: CostliestBackward, images: Sequence[int], prompts: Sequence[int], allowed: float
) -> tuple[int, int]:
    """What fits with the memory of the graphs, or without any where they alone are too much."""

    def largest() -> tuple[int, int]:
        return largest_that_fits(images, prompts, backward.num_queries, partial(peak_on_gpu, backward), allowed)

    fits = largest()
    if not fits[0] and backward.runner.give_up_graphs():
        logger.warning("the memory does not suffice for CUDA graphs: training without them")
        fits = largest()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
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
