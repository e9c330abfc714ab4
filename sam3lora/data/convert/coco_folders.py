"""Reading COCO data sets in the layouts of `sam3lora.data.split_files`, and writing folders of splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.data.coco_file import read_category_entries
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledObject, LabelledSet, order_names
from sam3lora.data.convert.layout import check_distinct, place_images
from sam3lora.data.faults import FaultLog
from sam3lora.data.ids import IdKey, id_key
from sam3lora.data.masks import Segmentation, mask_area, mask_box
from sam3lora.data.prompts import prompt_key
from sam3lora.data.rle import encode_rle
from sam3lora.data.split_files import find_splits, split_name
from sam3lora.data.void import VOID, is_void

_NOT_FAULTS_HERE = ("unused_category", "crowd")  # kept, or counted by the writer of a format that cannot express them


def read_coco(source: Path, names: Sequence[str] | None, log: FaultLog) -> LabelledSet:
    """Read all splits, with the repairs that training makes (`sam3lora.data.coco`).

    Categories are in the order of `names`, or of their ids if it is None.

    Raises:
        UserError: An annotation file is broken, or a split has no usable image.
    """
    splits: dict[str, list[LabelledImage]] = {}
    categories: list[str] = []
    found = find_splits(source)
    check_distinct([split.annotation_file for split in found], [split.name for split in found])
    for split in found:
        index = split.read("skip")
        log.include(fault for fault in index.faults if fault.kind not in _NOT_FAULTS_HERE)
        pieces = index.table.to_batches(max_chunksize=1000)
        splits[split_name(split.name)] = [_labelled_image(record) for piece in pieces for record in piece.to_pylist()]
        categories += _category_names(read_category_entries(split.annotation_file), index.names, log)
    return LabelledSet(order_names(categories, names, source), splits)


def _category_names(rows: list[dict[str, Any]], used: Sequence[str], log: FaultLog) -> list[str]:
    """Names by ascending id, without that of void regions, and without unused rows that name a group of categories, as
    Roboflow exports have."""
    spelling = {prompt_key(name): name for name in used}
    names = []
    for row in sorted(rows, key=_id_order):
        key = prompt_key(row["name"])
        parent = any(row is not other and prompt_key(str(other.get("supercategory"))) == key for other in rows)
        if key not in spelling and parent:
            log.add("parent_category", f"id {row['id']} {row['name']!r}")
        elif key in spelling or key != VOID:
            names.append(spelling.get(key, row["name"].strip()))
    return names


def _id_order(row: dict[str, Any]) -> tuple[bool, IdKey]:
    """Numbers by their value, then texts."""
    key = id_key(row["id"])
    assert key is not None  # the index has refused others
    return isinstance(key, str), key


def _labelled_image(record: dict[str, Any]) -> LabelledImage:
    size_hw = record["height"], record["width"]
    objects: list[LabelledObject] = []
    voids: list[LabelledObject] = []
    for annotation in record["annotations"]:
        x, y, w, h = annotation["bbox_xywh"]
        mask, is_crowd = annotation["segmentation"], annotation["iscrowd"]
        thing = LabelledObject(annotation["category"], mask, (x, y, w, h), is_crowd)
        (voids if is_void(annotation) else objects).append(thing)
    return LabelledImage(Path(record["path"]), size_hw, objects, _union(voids, size_hw))


def _union(things: Sequence[LabelledObject], size_hw: tuple[int, int]) -> Segmentation:
    if len(things) == 1 and things[0].segmentation is not None:
        return things[0].segmentation
    masks = [thing.decode(size_hw) for thing in things]
    return encode_rle(np.logical_or.reduce(masks)) if masks else None


def write_coco(labelled: LabelledSet, folder: Path, log: FaultLog) -> None:
    """Write every split. Ids count from 1, in order; areas are those of the masks, or of the boxes without a mask.

    Of an image that shows nothing but void any category may be there: its void is a crowd region of each of them.
    """
    ids = {name: number for number, name in enumerate(labelled.categories, 1)}
    if VOID not in map(prompt_key, ids) and any(
        image.void is not None and image.objects for image in labelled.images()
    ):
        ids[VOID] = len(ids) + 1
    for split, images in labelled.splits.items():
        files = place_images(images, folder / split, log)
        content = _coco_content(images, [path.name for path in files], ids)
        (folder / split / ANNOTATION_FILE).write_bytes(msgspec.json.encode(content))


def _coco_content(images: list[LabelledImage], file_names: list[str], ids: dict[str, int]) -> dict[str, list]:
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (image, file_name) in enumerate(zip(images, file_names, strict=True), 1):
        height, width = image.size_hw
        entries.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for thing in image.objects + _crowds_of_void(image, list(ids)):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[thing.category]}
            annotations.append(annotation | _annotation_of(thing, image.size_hw))
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def _crowds_of_void(image: LabelledImage, names: Sequence[str]) -> list[LabelledObject]:
    box = mask_box(image.void, image.size_hw)
    if box is None:
        return []
    marked = [name for name in names if (prompt_key(name) == VOID) == bool(image.objects)]
    return [LabelledObject(name, image.void, box, iscrowd=True) for name in marked]


def _annotation_of(thing: LabelledObject, size_hw: tuple[int, int]) -> dict[str, Any]:
    box_area = thing.bbox_xywh[2] * thing.bbox_xywh[3]
    return {
        "bbox": list(thing.bbox_xywh),
        "area": mask_area(thing.segmentation, size_hw) or box_area,
        "segmentation": _json_value(thing.segmentation),
        "iscrowd": int(thing.iscrowd),
    }


def _json_value(segmentation: Segmentation) -> Any:
    if isinstance(segmentation, str):
        return msgspec.Raw(segmentation.encode())
    return segmentation or []
