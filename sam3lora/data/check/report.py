"""A report on a COCO data set: what is in it, what is wrong with it, and what will be done about that."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.faults import IssueLog
from sam3lora.data.images import ImageError, read_image
from sam3lora.data.masks import mask_area
from sam3lora.data.split.leakage import Leak, count_augmented_copies, find_leaks
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

NUM_OBJECT_QUERIES = 200  # SAM 3's decoder
MAX_DETECTIONS = 100  # COCO's mAP counts no more detections an image and category
SIZE_LIMITS = (32**2, 96**2)  # COCO: small below, large from, in pixels of the original image


@dataclass
class SplitReport:
    """Counts of one split; areas are those of the masks (of the boxes where there is no mask)."""

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
    issues: IssueLog = field(default_factory=IssueLog)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "issues": [issue.to_dict() for issue in self.issues]}


@dataclass
class CheckReport:
    """What `check_folder` found."""

    root: str
    splits: list[SplitReport]
    leaks: list[Leak]

    @property
    def num_faults(self) -> int:
        return sum(issue.count for split in self.splits for issue in split.issues) + sum(k.count for k in self.leaks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "root": self.root,
            "splits": [split.to_dict() for split in self.splits],
            "leaks": [leak.to_dict() for leak in self.leaks],
        }

    def render(self, console: Console | None = None) -> None:
        """Print tables."""
        from sam3lora.data.check.tables import render_report

        render_report(self, console)


def check_folder(root: str | Path, annotation_file: str = ANNOTATION_FILE) -> CheckReport:
    """Read every annotation and decode every image of a data set.

    Args:
        root: Folder with one subfolder a split (`train`, `valid`, ...), or a split itself.
        annotation_file: Name of the annotation files.

    Raises:
        UserError: Nothing usable: no such folder, no annotation file, broken JSON, no image at all. Everything else
            is reported and does not raise.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}; expected a data set folder with train/ and valid/ inside")
    folders = [root] if (root / annotation_file).is_file() else []
    folders += sorted(p for p in root.iterdir() if p.is_dir() and (p / annotation_file).is_file())
    if not folders:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise UserError(f"no {annotation_file} in {root} or its subfolders; found {found}")
    reports, hashes = [], {}
    for folder in folders:
        name = "." if folder == root else folder.name
        report, hashes[name] = _check_split(name, CocoIndex.from_folder(folder, annotation_file, on_bad_image="skip"))
        reports.append(report)
    return CheckReport(str(root), reports, find_leaks(hashes))


def _check_split(name: str, index: CocoIndex) -> tuple[SplitReport, dict[str, str]]:
    """Report of a split and the content hash of each of its images."""
    records = index.table.to_pylist()
    report = SplitReport(name, num_images=len(records), issues=index.issues)
    report.categories = {category: {"images": 0, "objects": 0} for category in index.names}
    for record in records:
        _count_objects(record, report)
    report.num_augmented_copies = count_augmented_copies(record["file_name"] for record in records)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip((r["file_name"] for r in records), pool.map(_inspect_image, records), strict=True))
    for record in records:
        kind, detail = hashes[record["file_name"]][1:]
        if kind:
            report.issues.add(kind, f"image {record['image_id']} {detail}")
    return report, {file_name: digest for file_name, (digest, _, _) in hashes.items() if digest}


def _count_objects(record: dict[str, Any], report: SplitReport) -> None:
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    report.num_crowd += len(record["annotations"]) - len(objects)
    report.num_negatives += not record["annotations"]
    report.num_objects += len(objects)
    per_category = Counter(a["category"] for a in objects)
    for category, count in per_category.items():
        report.categories[category]["images"] += 1
        report.categories[category]["objects"] += count
        if count > NUM_OBJECT_QUERIES:
            report.issues.add("many_objects", f"image {record['image_id']}: {count} {category}")
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
    """(content hash, kind of fault or "", detail)."""
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
