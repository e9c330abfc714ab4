"""cgF1 of files in the SA-Co format, the layout of SAM 3's benchmark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3lora.data.coco_file import parse_json
from sam3lora.data.polygons import is_finite
from sam3lora.data.rle import read_rle
from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.cgf1 import CgF1, IouType, UnitCounts, accumulate, choose_annotator, count_unit
from sam3lora.evaluation.metrics.cgf1_units import REGION_KEY, make_unit


@dataclass(frozen=True)
class _Annotator:
    """One ground-truth file: ids and sizes of its images (each is a unit), the ids to evaluate, and the targets."""

    source: Path
    sizes_hw: dict[int, tuple[int, int]]
    exhaustive: set[int]
    category_ids: set[int]
    targets: dict[int, list[Any]]


def evaluate_saco(
    ground_truth_files: Sequence[str | Path],
    predictions_file: str | Path,
    iou_type: IouType = "segm",
    image_ids: Collection[int] | None = None,
) -> CgF1:
    """cgF1 of a predictions file in SAM 3's SA-Co format.

    Left out are images that are not instance-exhaustive in every ground-truth file, crowd annotations, and entries of
    categories that the ground truth does not list.

    Args:
        ground_truth_files: One file per annotator; for each image the annotator counts who agrees best.
        predictions_file: COCO results: image_id, category_id, score, and `segmentation` (compressed RLE) or `bbox`
            (xywh as fractions of the image's size, as in the ground truth).
        iou_type: "segm" compares masks, "bbox" boxes.
        image_ids: Image entries to judge; None takes all.

    Raises:
        UserError: A file is missing, truncated or of another layout, a mask is damaged or differs in size from its
            image, or the files belong to different splits.
    """
    annotators = [_read_annotator(Path(file), iou_type) for file in ground_truth_files]
    if not annotators:
        raise UserError("no ground-truth file: give one per annotator")
    first = annotators[0]
    for other in annotators[1:]:
        if difference := {image for image, _ in first.sizes_hw.items() ^ other.sizes_hw.items()}:
            raise UserError(
                f"{first.source} and {other.source} list different images ({len(difference)} in one only or of another "
                f"size, id {min(difference)} for one): give the annotators' files of one split"
            )
    predictions = _read_predictions(Path(predictions_file), first, iou_type)
    evaluated = set.intersection(*(annotator.exhaustive for annotator in annotators))
    return accumulate(
        choose_annotator([_count_image(image, annotator, predictions, iou_type) for annotator in annotators])
        for image in first.sizes_hw
        if image in evaluated and (image_ids is None or image in image_ids)
    )


def _count_image(
    image: int, annotator: _Annotator, predictions: Mapping[int, list[dict[str, Any]]], iou_type: IouType
) -> UnitCounts:
    detections = [entry for entry in predictions.get(image, []) if entry["category_id"] in annotator.category_ids]
    return count_unit(make_unit(detections, annotator.targets.get(image, []), iou_type))


def _read_annotator(source: Path, iou_type: IouType) -> _Annotator:
    raw = _read_json(source)
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(raw, dict) or not isinstance(raw.get(key), list)]
    if missing:
        raise UserError(
            f"{source} is not SA-Co ground truth: expected lists {', '.join(keys)}, without {', '.join(missing)}"
        )
    images, annotations, categories = (raw[key] for key in keys)
    _check_keys(source, "images", images, ("id", "height", "width", "is_instance_exhaustive"))
    _check_keys(source, "annotations", annotations, ("image_id", "category_id", REGION_KEY[iou_type]))
    _check_keys(source, "categories", categories, ("id",))
    sizes_hw = {image["id"]: (image["height"], image["width"]) for image in images}
    if len(sizes_hw) < len(images):
        raise UserError(f"{source} lists {len(images)} images with {len(sizes_hw)} ids: expected one id for each")
    category_ids = {category["id"] for category in categories}
    targets = defaultdict(list)
    for position, annotation in enumerate(annotations):
        where = f"{source}: annotations[{position}]"
        if annotation["image_id"] not in sizes_hw:
            raise UserError(f"{where} has image_id {annotation['image_id']!r}, which its images lack: export it again")
        if annotation["category_id"] in category_ids and not annotation.get("iscrowd"):
            region = _read_region(annotation, sizes_hw[annotation["image_id"]], iou_type, where)
            targets[annotation["image_id"]].append(region)
    exhaustive = {image["id"] for image in images if image["is_instance_exhaustive"]}
    return _Annotator(source, sizes_hw, exhaustive, category_ids, targets)


def _read_predictions(source: Path, truth: _Annotator, iou_type: IouType) -> dict[int, list[dict[str, Any]]]:
    """Detections by image, in the file's order."""
    raw = _read_json(source)
    if not isinstance(raw, list):
        raise UserError(f"{source} is no predictions file: expected a list of COCO results, got {type(raw).__name__}")
    region_key = REGION_KEY[iou_type]
    _check_keys(source, "predictions", raw, ("image_id", "category_id", "score", region_key))
    unknown = {entry["image_id"] for entry in raw} - truth.sizes_hw.keys()
    if unknown:
        raise UserError(
            f"{source} is a predictions file of another split: {truth.source} lacks {len(unknown)} of its image ids, "
            f"{min(unknown)} for one"
        )
    predictions = defaultdict(list)
    for position, entry in enumerate(raw):
        where = f"{source}: predictions[{position}]"
        if not is_finite(entry["score"]):
            raise UserError(f"{where} has score {entry['score']!r}: expected a number")
        region = _read_region(entry, truth.sizes_hw[entry["image_id"]], iou_type, where)
        predictions[entry["image_id"]].append(entry | {region_key: region})
    return predictions


def _read_json(source: Path) -> Any:
    try:
        return parse_json(source, source.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; give an existing JSON file") from None


def _check_keys(source: Path, name: str, entries: Iterable[Any], keys: Sequence[str]) -> None:
    for position, entry in enumerate(entries):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise UserError(f"{source}: {name}[{position}] lacks {', '.join(missing)}; expected the SA-Co layout")
        for key in keys:
            if key.endswith("id") and not isinstance(entry[key], int):
                raise UserError(f"{source}: {name}[{position}] has {key} {entry[key]!r}: expected an integer")


def _read_region(entry: Mapping[str, Any], size_hw: tuple[int, int], iou_type: IouType, where: str) -> Any:
    region = entry[REGION_KEY[iou_type]]
    if iou_type == "bbox":
        if not isinstance(region, list) or len(region) != 4 or not all(map(is_finite, region)):
            raise UserError(f"{where} has bbox {region!r}: expected [x, y, width, height]")
        return region
    if not isinstance(region, dict):
        raise UserError(f"{where}: expected segmentation as a compressed RLE, got {type(region).__name__}")
    try:
        rle = read_rle(region)
    except ValueError as error:
        raise UserError(f"{where} has a damaged mask: {error}") from None
    if tuple(rle["size"]) != size_hw:
        raise UserError(
            f"{where} has a mask of {rle['size'][0]} x {rle['size'][1]} pixels, its image has {size_hw[0]} x "
            f"{size_hw[1]} (height x width): give masks at the image's size"
        )
    return rle
