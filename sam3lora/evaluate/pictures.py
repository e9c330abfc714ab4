"""Side-by-side pictures of what was labelled, what the base finds and what the adapter finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.images import read_image
from sam3lora.evaluate.split import SplitMetrics
from sam3lora.infer.drawing import mark_coco, side_by_side


def comparison_pictures(
    split_dir: str | Path, base: SplitMetrics, adapter: SplitMetrics, *, count: int = 12, threshold: float = 0.3
) -> Iterator[tuple[str, np.ndarray]]:
    """The first images of a split, none chosen: labels, base and adapter in a row.

    Args:
        split_dir: Folder of the images.
        base: Metrics of the base model on the split.
        adapter: Metrics of the adapter on the same split.
        count: At most so many pictures.
        threshold: Lowest score drawn.

    Yields:
        File name and picture, uint8 (H, W, 3) RGB.
    """
    truth = base.ground_truth
    names = {category["id"]: category["name"] for category in truth["categories"]}
    for image in truth["images"][:count]:
        size_hw = (image["height"], image["width"])
        labels = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        marked = [
            mark_coco(entries, names, size_hw)
            for entries in (labels, _best(base, image, threshold), _best(adapter, image, threshold))
        ]
        pixels = read_image(Path(split_dir) / image["file_name"], expected_size_hw=size_hw)
        yield image["file_name"], side_by_side(pixels, *marked)


def _best(metrics: SplitMetrics, image: Mapping[str, Any], threshold: float) -> list[dict[str, Any]]:
    found = [p for p in metrics.predictions if p["image_id"] == image["id"] and p["score"] >= threshold]
    return sorted(found, key=lambda prediction: -prediction["score"])
