"""Checking a COCO data set: counts, faults, and pictures that two splits share."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.coco_limits import MAX_DETECTIONS
from sam3lora.data.faults import FaultLog
from sam3lora.data.index_columns import object_columns
from sam3lora.data.inspection import inspect_table
from sam3lora.data.label_check import LabelReport
from sam3lora.data.split.leakage import Leak, count_augmented_copies, find_leaks
from sam3lora.data.split_files import find_splits, no_splits
from sam3lora.errors import UserError
from sam3lora.progress import Progress

NUM_OBJECT_QUERIES = 200  # of SAM 3's decoder
SIZES = ("small", "medium", "large")


@dataclass
class CheckedSplit:
    """Counts and faults of one split. Sizes are areas of the masks, or of the boxes of objects without a mask."""

    name: str
    num_images: int = 0
    num_negatives: int = 0  # images without any object
    num_objects: int = 0
    num_crowd: int = 0
    num_augmented_copies: int = 0
    categories: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))
    max_objects_per_image: int = 0
    max_objects_per_query: int = 0
    num_images_above_max_detections: int = 0
    faults: FaultLog = field(default_factory=FaultLog)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, where faults are called issues."""
        values = dict(vars(self))
        return values | {"issues": [fault.to_dict() for fault in values.pop("faults")]}


@dataclass
class CheckReport:
    root: str
    splits: list[CheckedSplit]
    leaks: list[Leak]
    labels: LabelReport | None = None

    @property
    def num_faults(self) -> int:
        num_faults = sum(fault.count for split in self.splits for fault in split.faults)
        return num_faults + sum(leak.count for leak in self.leaks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "splits": [split.to_dict() for split in self.splits],
            "leaks": [leak.to_dict() for leak in self.leaks],
            **({"labels": self.labels.to_dict()} if self.labels else {}),
        }


def check_folder(
    root: str | Path, annotation_file: str = ANNOTATION_FILE, *, num_processes: int = 0, progress: bool = False
) -> CheckReport:
    """Read every annotation and decode every image of a data set: a folder of splits, or the folder of one.

    Args:
        root: Folder that holds `annotation_file`, or folders that do.
        annotation_file: Name of the COCO files.
        num_processes: See `inspect_table`.
        progress: Show a bar on standard error, if that is a terminal.

    Raises:
        UserError: There is no such folder, no annotation file, no image at all, or the JSON is broken. Everything else
            is counted in the report.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}; expected a data set folder with train/ and valid/ inside")
    splits = find_splits(root, annotation_file)
    if not splits:
        raise UserError(no_splits(root, annotation_file))
    reports, digests, num_images = [], {}, 0
    style = "bar" if progress and sys.stderr.isatty() else "off"
    with Progress(unit="images", style=style, stderr=True, transient=True) as bar:
        for split in splits:
            bar.update(num_images, note=f"{split.name}: reading {split.annotation_file.name}")
            index = split.read("skip", allow_empty=True)
            num_images += len(index)
            bar.update(num_images - len(index), total=num_images, note=split.name)
            report = _count_objects(split.name, index)
            digests[split.name] = _inspect(index, report, bar, num_processes)
            reports.append(report)
    return CheckReport(str(root), reports, find_leaks(digests))


def _count_objects(name: str, index: CocoIndex) -> CheckedSplit:
    """The report of what the index alone tells."""
    objects = object_columns(index.table)
    is_object_T = ~objects.crowd_T
    report = CheckedSplit(name, num_images=len(index), faults=index.faults)
    report.num_objects, report.num_crowd = int(is_object_T.sum()), int(objects.crowd_T.sum())
    report.num_negatives = int((objects.count_per_image() == 0).sum())
    report.num_augmented_copies = count_augmented_copies(index.table["file_name"].to_pylist())
    rows, positions, counts, names = objects.count_pairs(chosen_T=is_object_T)
    images_of = np.bincount(positions, minlength=len(names)).tolist()
    objects_of = np.bincount(positions, counts, minlength=len(names)).astype(int).tolist()
    counted = {name: {"images": i, "objects": o} for name, i, o in zip(names, images_of, objects_of, strict=True)}
    report.categories = {name: counted.get(name, {"images": 0, "objects": 0}) for name in index.names}
    for pair in np.flatnonzero(counts > NUM_OBJECT_QUERIES).tolist():
        image_id = index.written_id(index.table["image_id"][int(rows[pair])].as_py())
        report.faults.add("many_objects", f"image {image_id}: {counts[pair]} {names[positions[pair]]}")
    report.num_images_above_max_detections = len(np.unique(rows[counts > MAX_DETECTIONS]))
    report.max_objects_per_query = int(counts.max(initial=0))
    report.max_objects_per_image = int(objects.count_per_image(is_object_T).max(initial=0))
    return report


def _inspect(index: CocoIndex, report: CheckedSplit, bar: Progress, num_processes: int) -> dict[str, str]:
    """Add what files and masks tell to the report; returns the content hash of each file that can be read."""
    digests: dict[str, str] = {}
    image_ids = iter(index.table["image_id"].to_pylist())
    num_labels = iter(object_columns(index.table).count_per_image().tolist())
    with contextlib.closing(inspect_table(index.table, num_processes=num_processes)) as pieces:
        for piece in pieces:
            for image, image_id, number in zip(piece.images, image_ids, num_labels, strict=False):
                if image.fault:
                    report.faults.add(image.fault, f"image {index.written_id(image_id)} {image.detail}")
                if image.fault == "unreadable_image" and number:
                    report.faults.add("left_out_label", count=number)
                if image.digest:
                    digests[image.file_name] = image.digest
            for size, number in zip(SIZES, piece.num_of_size, strict=True):
                report.sizes[size] += number
            bar.advance(len(piece.images))
    return digests
