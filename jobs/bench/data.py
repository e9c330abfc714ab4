"""Reading training data: decoding, resizing, drawing masks and packing, beside a torch `DataLoader` doing the same."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from torch import Tensor

from jobs.bench.plain_data import plain_loader
from jobs.bench.processes import Measured, Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from sam3lora.data.coco import CocoIndex
from sam3lora.data.pipeline import iterate_batches, stream_batches
from sam3lora.data.plan import BatchPlan
from sam3lora.data.sample import DecodeSettings
from sam3lora.errors import UserError

Tensors = dict[str, Tensor]

ANNOTATIONS = "_annotations.coco.json"
BATCH_SIZE = 4
SIZE_HW = (720, 960)
CATEGORIES = ("bolt", "crack", "gear", "pothole")

OURS, PLAIN = "sam3lora, in process", "DataLoader, in process"
OURS_RAY, PLAIN_WORKER = "sam3lora, Ray Data with 1 task", "DataLoader, 1 worker"


@dataclass(frozen=True)
class DataWork:
    """What is read: `num_images` JPEGs of 960 x 720 with `num_objects` polygons each, into squares of
    `resolution`; masks too, as `loss.mask_resolution: full`, the default, compares them.
    """

    resolution: int
    num_images: int = 64
    num_objects: int = 8

    def __post_init__(self) -> None:
        for name in ("num_images", "num_objects"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.resolution < 14:
            raise UserError(f"resolution must be at least one patch of 14 pixels, got {self.resolution}")


def compare_data(
    resolutions: Sequence[int] = (336, 1008), *, num_images: int = 64, rounds: int = 3, use_ray: bool = True
) -> list[BenchReport]:
    """Wall time and processor time from files to what a training step takes: pixels as bytes, boxes, masks as booleans.

    Each way has a process of its own, one decoding thread, and reads all images in each round. Processor time is that
    of the process and all its children, so it counts what moves batches between processes.

    Args:
        resolutions: Sides of the model's input.
        num_images: Read in each round.
        rounds: Measured; the median counts.
        use_ray: Also measure Ray Data.

    Raises:
        UserError: A number that is not positive, or a resolution of less than a patch.
    """
    if rounds < 1:
        raise UserError(f"rounds must be positive, got {rounds}")
    works = [DataWork(resolution, num_images) for resolution in resolutions]
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), works[0])
        return [_compare(Path(folder), work, rounds=rounds, use_ray=use_ray) for work in works]


def _compare(folder: Path, work: DataWork, *, rounds: int, use_ray: bool) -> BenchReport:
    arguments = {"folder": folder, "work": work}
    ways = {
        OURS: Work(make_ours, arguments | {"use_ray": False}),
        PLAIN: Work(make_plain, arguments | {"num_workers": 0}),
        PLAIN_WORKER: Work(make_plain, arguments | {"num_workers": 1}),
    }
    if use_ray:
        ways[OURS_RAY] = Work(make_ours, arguments | {"use_ray": True})
    found = measure_in_turns(ways, rounds=rounds, num_threads=1)
    cpu = {name: float(np.median([result["cpu_s"] for result in way.results])) for name, way in found.items()}

    def same(*names: str) -> bool:
        return len({result["digest"] for name in names for result in found[name].results}) == 1

    side = work.resolution
    return BenchReport(
        title=f"{work.num_images} JPEGs of {SIZE_HW[1]} x {SIZE_HW[0]}, {work.num_objects} polygons each, "
        f"to pixels and masks of {side} x {side}",
        ways=[Timing(name, way.median) for name, way in found.items()],
        facts={
            **{f"images/s, {name}": round(work.num_images / way.median, 1) for name, way in found.items()},
            **{f"images/s after the first batch, {name}": round(_rate(work, way), 1) for name, way in found.items()},
            **{f"processor ms an image, {name}": round(1000 * cpu[name] / work.num_images, 2) for name in found},
            "processor time, ours / DataLoader, in process": round(cpu[OURS] / cpu[PLAIN], 3),
            **{
                f"seconds to the first batch, {name}": round(found[name].results[-1]["first_batch_s"], 2)
                for name in found
            },
            "in process and Ray Data give the same bytes": same(OURS, OURS_RAY) if use_ray else None,
            "DataLoaders give the same bytes": same(PLAIN, PLAIN_WORKER),
            **agreement(folder, work),
        },
    )


def _rate(work: DataWork, way: Measured) -> float:
    first_s = float(np.median([result["first_batch_s"] for result in way.results]))
    return max(work.num_images - BATCH_SIZE, 0) / max(way.median - first_s, 1e-9)


def make_ours(folder: Path, work: DataWork, use_ray: bool) -> Round:
    """A round reads all images as the trainer does."""
    if use_ray:
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=500_000_000)
    read = our_batches(folder, work, use_ray=use_ray)
    return lambda: _read_all(read())


def make_plain(folder: Path, work: DataWork, num_workers: int) -> Round:
    """A round reads all images by a `DataLoader`."""
    if num_workers:  # the processes of a benchmark are daemons, which may have no children
        multiprocessing.current_process().daemon = False
    loader = plain_batches(folder, work, num_workers=num_workers)
    return lambda: _read_all(iter(loader))


def our_batches(folder: Path, work: DataWork, *, use_ray: bool) -> Callable[[], Iterator[Tensors]]:
    cv2.setNumThreads(1)
    index = CocoIndex.from_folder(folder, ANNOTATIONS)
    settings = DecodeSettings(names=index.names, resolution=work.resolution, mask_size=work.resolution)
    plans = [
        BatchPlan(0, step, list(range(first, min(first + BATCH_SIZE, work.num_images))))
        for step, first in enumerate(range(0, work.num_images, BATCH_SIZE))
    ]

    def batches() -> Iterator[Tensors]:
        if use_ray:
            decoded = stream_batches(index.table, plans, settings, num_cpus=1)
        else:
            decoded = iterate_batches(index.table, plans, settings)
        for batch in decoded:
            masks = batch.masks()
            assert masks is not None
            yield {
                "images": torch.from_numpy(batch.images_NHWC),
                "query_image": torch.from_numpy(batch.query_image_B),
                "num_targets": torch.from_numpy(batch.num_B),
                "boxes": torch.from_numpy(batch.boxes_cxcywh_T4),
                "masks": masks,
            }

    return batches


def plain_batches(folder: Path, work: DataWork, *, num_workers: int) -> Iterable[Tensors]:
    cv2.setNumThreads(1)
    return plain_loader(
        folder,
        ANNOTATIONS,
        resolution=work.resolution,
        mask_size=work.resolution,
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
    )


def agreement(folder: Path, work: DataWork) -> dict[str, Any]:
    """How the first batch of both ways differs."""
    ours, plain = (
        next(our_batches(folder, work, use_ray=False)()),
        next(iter(plain_batches(folder, work, num_workers=0))),
    )
    if any(not torch.equal(ours[name], plain[name]) for name in ("query_image", "num_targets")):
        return {"same queries and targets": False}
    return {
        "same queries and targets": True,
        "largest difference of pixels, of 255": int((ours["images"].int() - plain["images"].int()).abs().max()),
        "largest difference of boxes": float((ours["boxes"] - plain["boxes"]).abs().max()),
        "mask pixels that differ": round(float((ours["masks"] ^ plain["masks"]).float().mean()), 9),
    }


def _read_all(batches: Iterator[Tensors]) -> dict[str, Any]:
    """Go through the batches; only the first one is looked at, so that looking takes little time."""
    before, start = processor_seconds(), time.perf_counter()
    first = next(batches)
    first_batch_s = time.perf_counter() - start
    digest = 0
    for name in ("images", "query_image", "num_targets", "boxes", "masks"):
        digest = zlib.crc32(first[name].contiguous().numpy().data, digest)
    del first
    for _ in batches:
        pass
    return {"cpu_s": processor_seconds() - before, "first_batch_s": first_batch_s, "digest": digest}


def processor_seconds() -> float:
    """Processor time so far of this process and of its children, those that have ended included."""
    processes = [psutil.Process()]
    processes += processes[0].children(recursive=True)
    seconds = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def write_photographs(folder: Path, work: DataWork, *, seed: int = 0) -> None:
    """A COCO folder of noisy pictures (about 250 KB each) with star-shaped objects and their outlines."""
    height, width = SIZE_HW
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(work.num_images):
        generator = np.random.default_rng([seed, number])
        coarse = generator.integers(0, 255, (height // 24, width // 24, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        for part in range(work.num_objects):
            outline = _star(generator)
            colour = generator.integers(0, 255, 3).tolist()
            cv2.fillPoly(picture, [outline.round().astype(np.int32)], colour)
            low, high = outline.min(0), outline.max(0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1 + (number + part % 2) % len(CATEGORIES),
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(np.prod(high - low)),
                    "segmentation": [outline.ravel().tolist()],
                    "iscrowd": 0,
                }
            )
        noise = generator.integers(0, 16, picture.shape, dtype=np.uint8)
        picture = np.minimum(picture, 255 - noise) + noise
        name = f"{number:05d}.jpg"
        cv2.imwrite(str(folder / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")


def _star(generator: np.random.Generator) -> np.ndarray:
    """Outline (40, 2) of an object of 5 to 25 % of the picture's height, in pixels, wholly inside."""
    height, width = SIZE_HW
    radius = generator.uniform(0.05, 0.25) * height / 2
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = radius * (1 + 0.2 * np.sin(generator.integers(3, 8) * angles))
    centre = generator.uniform((1.2 * radius, 1.2 * radius), (width - 1.2 * radius, height - 1.2 * radius))
    return centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
