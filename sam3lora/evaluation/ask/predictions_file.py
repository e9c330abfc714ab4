"""Results that were written earlier, or by another program, judged without asking a model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.data.masks import encode_segmentation
from sam3lora.data.prompts import prompt_key
from sam3lora.data.rle import read_rle
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.run import asked_categories
from sam3lora.evaluation.metrics.ground_truth import build_ground_truth
from sam3lora.evaluation.metrics.measure import SplitMetrics, measure_split
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.split_results import SplitResults


def evaluate_predictions(file: str | Path, split_dir: Path, settings: EvaluationSettings) -> SplitMetrics:
    """Measure a COCO results file on a split, as it is: nothing is suppressed or merged.

    Args:
        file: JSON list of image_id, category_id, segmentation (RLE or polygons), score, and optionally bbox (xywh).
        split_dir: Folder with the annotation file, whose ids the results use.

    Raises:
        UserError: The file is missing, truncated or no COCO results, or belongs to another split.
    """
    started = time.perf_counter()
    source = Path(file)
    index = CocoIndex.from_folder(split_dir, settings.annotation_file)
    listed = set(index.table.column("image_id").to_pylist())
    if settings.num_samples is not None:
        index = index.select_rows(range(min(settings.num_samples, len(index))))
    categories = asked_categories(index, settings)
    truth = build_ground_truth(index, categories)
    sizes_hw = {image["id"]: (image["height"], image["width"]) for image in truth.coco["images"]}
    asked = {category.id for category in categories}
    # Categories that share a prompt share an id.
    ids = {id_: id_ for id_ in index.category_names}
    for category in categories:
        ids[category.id] = category.id
        ids |= {
            id_: category.id for id_, name in index.category_names.items() if prompt_key(name) in category.name_keys
        }
    results = SplitResults()
    for position, entry in enumerate(_read_list(source)):
        where = f"{source}: entry {position}"
        _check_entry(entry, where)
        if entry["image_id"] not in listed or entry["category_id"] not in ids:
            key = "image_id" if entry["image_id"] not in listed else "category_id"
            raise UserError(
                f"{where} has {key} {entry[key]!r}, which {index.source} lacks: this is a predictions file of another "
                "split or data set"
            )
        if entry["image_id"] in sizes_hw and ids[entry["category_id"]] in asked:
            results.predictions.append(_clean(entry, ids[entry["category_id"]], sizes_hw[entry["image_id"]], where))
    results.num_before_nms = len(results.predictions)
    return measure_split(
        truth,
        results,
        label=source.stem,
        post=settings.post_processing(PostProcessing()),
        exhaustive=settings.exhaustive,
        settings={"data": str(split_dir), "predictions": str(source)},
        split_dir=split_dir,
        seconds=time.perf_counter() - started,
    )


def _read_list(source: Path) -> list[Any]:
    try:
        raw = json.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; give an existing JSON file") from None
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON ({error}); is the file truncated? Write it again") from None
    if not isinstance(raw, list):
        raise UserError(f"{source} is no predictions file: expected a list of COCO results, got {type(raw).__name__}")
    return raw


def _check_entry(entry: Any, where: str) -> None:
    keys = ("image_id", "category_id", "segmentation", "score")
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: expected COCO results with masks")
    score = entry["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise UserError(f"{where} has score {score!r}: expected a number")


def _clean(entry: Mapping[str, Any], category_id: int, size_hw: tuple[int, int], where: str) -> dict[str, Any]:
    try:
        mask = entry["segmentation"]
        rle = read_rle(mask) if isinstance(mask, dict) else encode_segmentation(mask, size_hw)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} has a damaged mask: {error}") from None
    if rle is None or tuple(rle["size"]) != size_hw:
        found = "none" if rle is None else "{} x {}".format(*rle["size"])
        raise UserError(f"{where}: expected a mask of {size_hw[0]} x {size_hw[1]} pixels (height x width), got {found}")
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    kept = {"image_id": entry["image_id"], "category_id": category_id, "score": float(entry["score"])}
    box = {"bbox": entry["bbox"]} if entry.get("bbox") else {}
    return kept | box | {"segmentation": {"size": list(size_hw), "counts": text}}
