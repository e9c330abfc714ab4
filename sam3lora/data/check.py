"""Checking a COCO data set: counts, faults, and pictures that two splits share."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.faults import FaultLog
from sam3lora.data.images import ImageError, read_image
from sam3lora.data.masks import mask_area
from sam3lora.data.split.leakage import Leak, count_augmented_copies, find_leaks
from sam3lora.data.split_files import find_splits, no_splits
from sam3lora.errors import UserError

NUM_OBJECT_QUERIES = 200  # of SAM 3's decoder
MAX_DETECTIONS = 100  # per image and category, of COCO's mAP
SIZE_LIMITS = (32**2, 96**2)  # between COCO's small, medium and large, in pixels of the original image


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
    sizes: dict[str, int] = field(default_factory=lambda: {"small": 0, "medium": 0, "large": 0})
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

    @property
    def num_faults(self) -> int:
        num_faults = sum(fault.count for split in self.splits for fault in split.faults)
        return num_faults + sum(leak.count for leak in self.leaks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "splits": [split.to_dict() for split in self.splits],
            "leaks": [leak.to_dict() for leak in self.leaks],
        }


def check_folder(root: str | Path, annotation_file: str = ANNOTATION_FILE) -> CheckReport:
    """Read every annotation and decode every image of a data set: a folder of splits, or the folder of one.

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
    reports, hashes = [], {}
    for split in splits:
        report, hashes[split.name] = _check_split(split.name, split.read("skip"))
        reports.append(report)
    return CheckReport(str(root), reports, find_leaks(hashes))


def _check_split(name: str, index: CocoIndex) -> tuple[CheckedSplit, dict[str, str]]:
    """The report, and the content hash of each image."""
    records = index.table.to_pylist()
    report = CheckedSplit(name, num_images=len(records), faults=index.faults)
    report.categories = {category: {"images": 0, "objects": 0} for category in index.names}
    for record in records:
        _count_objects(record, report)
    report.num_augmented_copies = count_augmented_copies(record["file_name"] for record in records)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip((r["file_name"] for r in records), pool.map(_inspect_image, records), strict=True))
    for record in records:
        kind, detail = hashes[record["file_name"]][1:]
        if kind:
            report.faults.add(kind, f"image {record['image_id']} {detail}")
    return report, {file_name: digest for file_name, (digest, _, _) in hashes.items() if digest}


def _count_objects(record: dict[str, Any], report: CheckedSplit) -> None:
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    report.num_crowd += len(record["annotations"]) - len(objects)
    report.num_negatives += not record["annotations"]
    report.num_objects += len(objects)
    per_category = Counter(a["category"] for a in objects)
    for category, count in per_category.items():
        report.categories[category]["images"] += 1
        report.categories[category]["objects"] += count
        if count > NUM_OBJECT_QUERIES:
            report.faults.add("many_objects", f"image {record['image_id']}: {count} {category}")
    largest = max(per_category.values(), default=0)
    report.num_images_above_max_detections += largest > MAX_DETECTIONS
    report.max_objects_per_query = max(report.max_objects_per_query, largest)
    report.max_objects_per_image = max(report.max_objects_per_image, len(objects))
    for annotation in objects:
        area = mask_area(annotation["segmentation"], (record["height"], record["width"]))
        area = area or annotation["bbox_xywh"][2] * annotation["bbox_xywh"][3]
        size = "small" if area < SIZE_LIMITS[0] else "medium" if area < SIZE_LIMITS[1] else "large"
        report.sizes[size] += 1


def _inspect_image(record: dict[str, Any]) -> tuple[str, str, str]:
    """(content hash, kind of fault or "", detail of the fault)."""
    size_hw = (record["height"], record["width"])
    digest = ""
    try:
        data = Path(record["path"]).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        height, width = read_image(data, expected_size_hw=size_hw).shape[:2]
    except (ImageError, OSError) as error:
        return digest, "unreadable_image", f"{record['file_name']}: {error}"
    if (height, width) != size_hw:
        detail = f"{record['file_name']}: file {width} x {height}, annotations {size_hw[1]} x {size_hw[0]}"
        return digest, "size_mismatch", detail
    return digest, "", ""
