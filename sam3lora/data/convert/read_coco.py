"""COCO folders: `_annotations.coco.json` beside the images, in one folder or in one a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex, load_coco_json
from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet
from sam3lora.data.convert.layout import WHOLE, split_name, subfolders
from sam3lora.data.convert.names import order_names
from sam3lora.data.masks import parse_segmentation
from sam3lora.data.prompts import prompt_key

_NO_FAULTS = ("unused_category", "crowd")  # kept as they are, or counted where a format cannot express them


def find_coco_folders(source: Path) -> dict[str, Path]:
    """Split -> folder with an annotation file."""
    folders = {WHOLE: source} if (source / ANNOTATION_FILE).is_file() else {}
    found = [folder for folder in subfolders(source) if (folder / ANNOTATION_FILE).is_file()]
    return folders | {split_name(folder.name): folder for folder in found}


def read_coco(source: Path, names: Sequence[str] | None, log: FaultLog) -> LabelledSet:
    """Read all splits, with the repairs that training makes (`sam3lora.data.coco`).

    Args:
        source: See the module.
        names: Category names in order; None keeps the order of ids.
        log: Where faults are counted.

    Raises:
        UserError: A broken annotation file, or a split without a usable image.
    """
    splits: dict[str, list[LabelledImage]] = {}
    categories: list[str] = []
    for split, folder in find_coco_folders(source).items():
        index = CocoIndex.from_folder(folder, on_bad_image="skip")
        log.include(issue for issue in index.issues if issue.kind not in _NO_FAULTS)
        splits[split] = [_read_image(record) for record in index.table.to_pylist()]
        categories += _category_names(load_coco_json(folder / ANNOTATION_FILE)["categories"], index.names, log)
    return LabelledSet(order_names(categories, names, source), splits)


def _category_names(rows: list[dict[str, Any]], used: Sequence[str], log: FaultLog) -> list[str]:
    """Names by ascending id, without unused rows that stand for a whole group (Roboflow's exports begin with one)."""
    spelling = {prompt_key(name): name for name in used}
    names = []
    for row in sorted(rows, key=lambda row: int(row["id"])):
        key = prompt_key(row["name"])
        parent = any(row is not other and prompt_key(str(other.get("supercategory"))) == key for other in rows)
        if key not in spelling and parent:
            log.add("parent_category", f"id {row['id']} {row['name']!r}")
        else:
            names.append(spelling.get(key, row["name"].strip()))
    return names


def _read_image(record: dict[str, Any]) -> LabelledImage:
    objects = []
    for annotation in record["annotations"]:
        segmentation = parse_segmentation(annotation["segmentation"])
        x, y, w, h = annotation["bbox_xywh"]
        objects.append(LabelledObject(annotation["category"], segmentation, (x, y, w, h), annotation["iscrowd"]))
    return LabelledImage(Path(record["path"]), (record["height"], record["width"]), objects)
