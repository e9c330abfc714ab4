"""Asking an engine every category of every image of a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory
from sam3lora.evaluation.split_results import SplitResults
from sam3lora.model.staged.forward import VisionFeatures

_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


def ask_split(
    engine: Engine,
    index: CocoIndex,
    categories: Sequence[PromptedCategory],
    *,
    post: PostProcessing,
    encode: Callable[[Sequence[Mapping[str, Any]]], VisionFeatures],
    batch_size: int = 4,
) -> SplitResults:
    """Ask the model of an engine, with what PEFT layers it has; detections of any score are kept, as mAP needs.

    Args:
        engine: The model.
        index: The split, or a part of it.
        categories: What to ask of every image.
        post: Suppression or merging, and limit.
        encode: From records to the features of their images.
        batch_size: Images at a time.

    Raises:
        ImageError: An image cannot be read.
    """
    parts = []
    prompts = tuple(category.prompt for category in categories)
    for start in range(0, len(index), batch_size):
        records = [index.record(row) for row in range(start, min(start + batch_size, len(index)))]
        images = [
            PreparedImage(str(row), _NO_PIXELS, (record["height"], record["width"]), features)
            for row, (record, features) in enumerate(zip(records, encode(records).split(), strict=True), start)
        ]
        found = engine.detect([PromptedImage(image, prompts, post=post, lowest_score=0.0) for image in images])
        parts.append(SplitResults.collect(records, categories, found))
    return SplitResults.join(parts, index.table.column("image_id").to_pylist())
