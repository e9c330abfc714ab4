"""Side-by-side pictures of what was labelled, what the base finds and what the adapter finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.images import read_image
from sam3lora.evaluate.split import SplitMetrics
from sam3lora.infer.drawing import mark_coco, side_by_side

MAX_DRAWN = 20


def comparison_pictures(
    split_dir: str | Path,
    base: SplitMetrics,
    adapter: SplitMetrics,
    *,
    count: int = 12,
    threshold: float = 0.3,
    nms_iou: float = 0.7,
) -> Iterator[tuple[str, np.ndarray]]:
    """The first images of a split, none chosen: labels, base and adapter in a row.

    Args:
        split_dir: Folder of the images.
        base: Metrics of the base model on the split.
        adapter: Metrics of the adapter on the same split.
        count: At most so many pictures.
        threshold: Lowest score drawn.
        nms_iou: Of two masks of a category that overlap more, only the better one is drawn.

    Yields:
        File name and picture, uint8 (H, W, 3) RGB.
    """
    truth = base.ground_truth
    names = {category["id"]: category["name"] for category in truth["categories"]}
    for image in truth["images"][:count]:
        size_hw = (image["height"], image["width"])
        labels = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        found = [_best(metrics, image, threshold, nms_iou) for metrics in (base, adapter)]
        marked = [mark_coco(entries, names, size_hw) for entries in (labels, *(best[:MAX_DRAWN] for best in found))]
        counts = (f"labels: {len(labels)}", _caption("base", len(found[0])), _caption("adapter", len(found[1])))
        pixels = read_image(Path(split_dir) / image["file_name"], expected_size_hw=size_hw)
        yield image["file_name"], side_by_side(pixels, *marked, captions=counts)


def _best(metrics: SplitMetrics, image: Mapping[str, Any], threshold: float, nms_iou: float) -> list[dict[str, Any]]:
    """Detections above the threshold by descending score; of two of a category that overlap more, the better one."""
    found = [p for p in metrics.predictions if p["image_id"] == image["id"] and p["score"] >= threshold]
    kept: list[dict[str, Any]] = []
    for prediction in sorted(found, key=lambda p: -p["score"]):
        rivals = [other["segmentation"] for other in kept if other["category_id"] == prediction["category_id"]]
        overlaps = coco_mask.iou([prediction["segmentation"]], rivals, [0] * len(rivals)) if rivals else np.zeros(1)
        if overlaps.max() <= nms_iou:
            kept.append(prediction)
    return kept


def _caption(name: str, count: int) -> str:
    return f"{name}: {count}" + (f", best {MAX_DRAWN} drawn" if count > MAX_DRAWN else "")
