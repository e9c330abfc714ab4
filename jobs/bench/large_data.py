"""A data set of the size of COCO: its index beside pycocotools' `COCO(file)`, `data check`, plan and first batch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.data import processor_seconds
from jobs.bench.large_set import draw_large_set, scaled
from jobs.bench.processes import Measured, Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from sam3lora.config import load_config
from sam3lora.cpus import usable_cpus
from sam3lora.data.check import check_folder
from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.plan import plan_run
from sam3lora.progress import repeatedly
from sam3lora.training.datasets import BatchSource, load_run_data

FIRST, KEPT, PLAIN = "sam3lora index, first time", "sam3lora index, kept", "pycocotools COCO(file)"
CHECK, PLAN, BATCH = "data check", "plan", "first batch"
NUM_EPOCHS = 20


def compare_large_data(share: float = 1.0, *, folder: Path | None = None) -> list[BenchReport]:
    """Time and memory of what runs over a whole data set before it is trained on; each in a process of its own.

    Args:
        share: Of COCO's 118,000 training and 5,000 validation images.
        folder: Where the data set is, or is drawn and stays; None draws it in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = folder or Path(scratch) / "data"
        draw_large_set(root, scaled(share))
        arguments = {"root": root, "cache": Path(scratch) / "cache"}
        ways = {
            FIRST: Work(make_index, arguments | {"kept": False}),
            KEPT: Work(make_index, arguments | {"kept": True}),
            PLAIN: Work(make_plain, {"root": root}),
            CHECK: Work(make_check, arguments),
            PLAN: Work(make_plan, {"num_images": scaled(share)["train"].num_images}),
            BATCH: Work(make_first_batch, arguments),
        }
        found = measure_in_turns(ways, rounds=1, warm_ups=0)
        return _reports(found, root)


def _reports(found: Mapping[str, Measured], root: Path) -> list[BenchReport]:
    results: dict[str, dict[str, Any]] = {name: dict(way.results[0]) for name, way in found.items()}
    processor = {name: result.pop("processor s") for name, result in results.items()}
    size_mb = (root / "train" / ANNOTATION_FILE).stat().st_size / 1e6
    labels = results[FIRST]
    readers = (FIRST, KEPT, PLAIN)
    reports = [
        BenchReport(
            title="Reading the labels: {images} images with {annotations} annotations".format(**labels)
            + f" ({size_mb:.0f} MB of JSON)",
            ways=[_timing(found, name) for name in readers],
            facts={
                "processor seconds": {name: processor[name] for name in readers},
                "images and annotations are the same": all(results[name] == labels for name in readers),
            },
        )
    ]
    titles = {
        CHECK: "sam3lora data check: labels (kept), all masks and image files, of both splits",
        PLAN: f"The plan of {NUM_EPOCHS} epochs of single images",
        BATCH: "From a kept index to the first batch of a training, without Ray",
    }
    for name, title in titles.items():
        facts = {"processor seconds": processor[name]} | results[name]
        reports.append(BenchReport(title=title, ways=[_timing(found, name)], facts=facts))
    return reports


def _timing(found: Mapping[str, Measured], name: str) -> Timing:
    return Timing(name, found[name].median, found[name].extra_mib)


def _with_processor_time(run: Callable[[], dict[str, Any]]) -> Round:
    """Counts the processes that a round starts and ends; other work on the machine changes it less than wall time."""

    def timed() -> dict[str, Any]:
        before = processor_seconds()
        result = run()
        return {"processor s": round(processor_seconds() - before, 1), **result}

    return timed


def make_index(root: Path, cache: Path, kept: bool) -> Round:
    """Read the training split, with nothing kept or with what an earlier round has kept."""
    os.environ["SAM3LORA_CACHE"] = str(cache)

    def run() -> dict[str, Any]:
        if not kept:
            shutil.rmtree(cache, ignore_errors=True)
        index = CocoIndex.from_folder(root / "train")
        num_annotations = sum(len(chunk.flatten()) for chunk in index.table["annotations"].chunks)
        return {"images": len(index), "annotations": num_annotations}

    return _with_processor_time(run)


def make_plain(root: Path) -> Round:
    from pycocotools.coco import COCO

    def run() -> dict[str, Any]:
        coco = COCO(str(root / "train" / ANNOTATION_FILE))
        return {"images": len(coco.imgs), "annotations": len(coco.anns)}

    return _with_processor_time(run)


def make_check(root: Path, cache: Path) -> Round:
    os.environ["SAM3LORA_CACHE"] = str(cache)
    multiprocessing.current_process().daemon = False  # those of a benchmark are daemons, which may have no children
    num_processes = usable_cpus()

    def run() -> dict[str, Any]:
        peaks: dict[int, int] = {}
        with repeatedly(lambda: _keep_peaks(peaks), seconds=1.0):
            report = check_folder(root, num_processes=num_processes)
        return {
            "processes that read images": num_processes,
            "most memory of one of them, MiB": max(peaks.values(), default=0) >> 20,
            "objects by size, training split": report.splits[0].sizes,
        }

    return _with_processor_time(run)


def _keep_peaks(peaks: dict[int, int]) -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            peaks[process.pid] = max(peaks.get(process.pid, 0), process.memory_info().rss)


def make_plan(num_images: int) -> Round:
    def run() -> dict[str, Any]:
        return {"batches": sum(1 for _ in plan_run(num_images, images_per_step=1, num_epochs=NUM_EPOCHS))}

    return _with_processor_time(run)


def make_first_batch(root: Path, cache: Path) -> Round:
    os.environ["SAM3LORA_CACHE"] = str(cache)
    config = load_config("quick_test", [f"training.data_dir={root}", "training.num_epochs=20"])

    def run() -> dict[str, Any]:
        data = load_run_data(config, 336)
        with contextlib.closing(
            BatchSource(data, config, images_per_step=1, use_ray=False).training_batches(0, 0)
        ) as batches:
            batch = next(batches)
        return {"training images": data.summary()["num_train_images"], "queries of the first batch": batch.num_queries}

    return _with_processor_time(run)
