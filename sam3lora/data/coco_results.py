"""Reading a COCO results file of any program, by the same rules as labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from pycocotools import mask as coco_mask

from sam3lora.data.annotations import LabelError, clean_annotation
from sam3lora.data.coco import CocoIndex
from sam3lora.data.coco_file import parse_json, parse_text
from sam3lora.data.faults import LOST, FaultLog
from sam3lora.data.ids import id_key
from sam3lora.data.masks import encode_mask_at
from sam3lora.data.polygons import is_finite
from sam3lora.errors import UserError


class _Result(msgspec.Struct, gc=False):
    """An entry as it is written. Box and mask are left as text until they are looked at."""

    image_id: Any = None
    category_id: Any = None
    score: Any = None
    bbox: msgspec.Raw = msgspec.Raw(b"null")
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


@dataclass
class CocoResults:
    """Results of the images of an index.

    Attributes:
        results: `image_id` and `category_id` as the index numbers them, `segmentation` (compressed RLE at the image's
            size), `bbox` (xywh in pixels, within the image) and `score`, in the order of the file.
        num_listed: Number of entries.
        faults: What was repaired, and what was left out.
    """

    results: list[dict[str, Any]]
    num_listed: int
    faults: FaultLog


def read_results(source: Path, index: CocoIndex, further_categories: Collection[int] = ()) -> CocoResults:
    """Read and clean a results file; entries that cannot be read are left out and counted.

    Where a file is listed as several images, results that are equal for all its listings count once.

    Args:
        source: JSON list of image_id, category_id, score, segmentation (RLE or polygons) and optionally bbox (xywh in
            pixels; taken from the mask where it is missing).
        index: The labelled images that the results belong to. Ids are read as its file writes its own.
        further_categories: Category ids that the results may have beside those that the index lists.

    Raises:
        UserError: The file is missing, truncated, no list, or belongs to another split or data set, or none of its
            entries can be read.
    """
    found = CocoResults([], 0, FaultLog())
    rows = {image: row for row, image in enumerate(index.table.column("image_id").to_pylist())}
    heights, widths = (index.table.column(name).to_pylist() for name in ("height", "width"))
    copies: dict[int, dict[tuple[Any, ...], Any]] = {image: {} for image in index.image_ids.shared_numbers()}
    for position, entry in enumerate(_read_list(source)):
        found.num_listed += 1
        where = f"entry {position}"
        image_key, category_key = id_key(entry.image_id), id_key(entry.category_id)
        if image_key is None or category_key is None:
            found.faults.add("bad_result", where)
            continue
        image = index.image_ids.find(image_key)
        category = index.category_ids.find(category_key)
        if category is None and isinstance(category_key, int) and category_key in further_categories:
            category = category_key
        if image is None or category is None:
            key = "image_id" if image is None else "category_id"
            raise UserError(
                f"{source}: {where} has {key} {getattr(entry, key)!r}, which {index.source} lacks: this is a "
                "predictions file of another split or data set"
            )
        if category not in index.listed_names and category not in further_categories:
            found.faults.add("unknown_category", f"{where}: category {entry.category_id}")
            continue
        if image not in rows:
            found.faults.add("result_of_unclear_image", f"{where}: image {entry.image_id}")
            continue
        clean = _clean(entry, (heights[rows[image]], widths[rows[image]]), found.faults, where)
        if clean is None:
            continue
        if image in copies:
            content = (category, clean["score"], clean["segmentation"]["counts"])
            if copies[image].setdefault(content, image_key) != image_key:
                found.faults.add("duplicate_annotation", where)
                continue
        found.results.append({"image_id": image, "category_id": category} | clean)
    if found.num_listed and not found.results:
        lost = "; ".join(str(fault) for fault in found.faults if fault.level == LOST)
        raise UserError(f"{source}: none of its {found.num_listed} results can be used: {lost}")
    return found


def _read_list(source: Path) -> Iterator[_Result]:
    """Entries one after the other; of one that is no object everything is None."""
    try:
        data = source.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; give an existing JSON file") from None
    try:
        yield from msgspec.json.decode(data, type=list[_Result])
        return
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raw = parse_json(source, data)  # also with NaN, and entries of other types
    if not isinstance(raw, list):
        raise UserError(f"{source} is no predictions file: expected a list of COCO results, got {type(raw).__name__}")
    for entry in raw:
        yield _Result(**_with_texts(entry))


def _with_texts(entry: Any) -> dict[str, Any]:
    values = entry if isinstance(entry, dict) else {}
    kept = {name: values.get(name) for name in ("image_id", "category_id", "score")}
    return kept | {name: msgspec.Raw(json.dumps(values.get(name)).encode()) for name in ("bbox", "segmentation")}


def _clean(entry: _Result, size_hw: tuple[int, int], log: FaultLog, where: str) -> dict[str, Any] | None:
    score = entry.score
    if not is_finite(score):
        log.add("bad_score", f"{where}: {repr(score)[:40]}")
        return None
    if not 0 <= score <= 1:
        log.add("odd_score", f"{where}: {score:g}")
    raw = {"bbox": parse_text(entry.bbox), "segmentation": parse_text(entry.segmentation)}
    own = FaultLog()
    try:
        clean = clean_annotation(raw, size_hw, own, where)
    except LabelError:
        clean = None
    log.include(fault for fault in own if fault.kind not in ("box_without_mask", "mask_without_box"))
    if clean is None:
        return None
    rle = encode_mask_at(clean["segmentation"], size_hw)
    if rle is None or not coco_mask.area(rle):
        log.add("result_without_mask", where)
        return None
    mask = {"size": list(size_hw), "counts": rle["counts"].decode("ascii")}
    return {"bbox": clean["bbox_xywh"], "segmentation": mask, "score": float(score)}
