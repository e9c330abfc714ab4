"""Metrics of a model in memory on one COCO split: every category is asked of every image."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sam3lora.data.coco import CocoIndex
from sam3lora.engine.detect import TextCache, detect_prompts
from sam3lora.engine.detections import PostProcessing
from sam3lora.engine.pixels import to_pixel_values
from sam3lora.evaluation.ask.split_results import Answers, read_images
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory, build_ground_truth, prompted_categories
from sam3lora.evaluation.metrics.measure import SplitMetrics, measure_split
from sam3lora.model.staged.forward import StagedSam3, VisionFeatures

NO_SCORE_CUT = PostProcessing(threshold=0.0, nms="mask", nms_iou=0.7)


def ask_split(
    staged: StagedSam3,
    tokenizer: Any,
    index: CocoIndex,
    categories: Sequence[PromptedCategory],
    *,
    resolution: int,
    post: PostProcessing = NO_SCORE_CUT,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    max_prompts_per_forward: int = 8,
    text_cache: TextCache | None = None,
    encode: Callable[[Sequence[Mapping[str, Any]]], VisionFeatures] | None = None,
) -> Answers:
    """Ask a model in memory, with or without an adapter; it is in evaluation mode meanwhile.

    Args:
        staged: The model.
        tokenizer: The base model's tokenizer.
        index: The split, or a part of it.
        categories: What to ask of every image.
        resolution: Side of the model's input in pixels.
        post: What is done with overlapping detections.
        image_mean: Per channel, of pixels in [0, 1].
        image_std: Per channel.
        device: The model's device.
        batch_size: Images at a time.
        max_prompts_per_forward: (image, prompt) pairs at a time.
        text_cache: Text features to use and add to, where the text tower is frozen.
        encode: Gives the features of records' images, in place of reading them and running the vision tower.

    Raises:
        ImageError: An image cannot be read.
    """
    parts = []
    prompts = [category.prompt for category in categories]
    text_cache = {} if text_cache is None else text_cache
    dtype = next(staged.model.parameters()).dtype
    with _evaluation_mode(staged.model):
        for start in range(0, len(index), batch_size):
            records = [index.record(row) for row in range(start, min(start + batch_size, len(index)))]
            if encode is None:
                images = read_images(records)
                pixel_values_ICHW = to_pixel_values(
                    images, resolution, image_mean=image_mean, image_std=image_std, device=device, dtype=dtype
                )
            else:
                pixel_values_ICHW = torch.zeros(len(records), 3, 0, 0, device=device)  # nobody looks at them
            found = detect_prompts(
                staged,
                tokenizer,
                pixel_values_ICHW,
                prompts,
                sizes_hw=[(record["height"], record["width"]) for record in records],
                post=post,
                vision=None if encode is None else partial(encode, records),
                max_prompts_per_forward=max_prompts_per_forward,
                text_cache=text_cache,
            )
            parts.append(Answers.collect(records, categories, found))
    return Answers.join(parts, index.table.column("image_id").to_pylist())


def evaluate_split(
    staged: StagedSam3,
    tokenizer: Any,
    index: CocoIndex,
    *,
    names: Sequence[str] | None = None,
    prompts: Mapping[str, str] | None = None,
    threshold: float = 0.3,
    exhaustive: bool = True,
    **options: Any,
) -> SplitMetrics:
    """Detect every category in every image and compare with the annotations at their own size.

    Args:
        staged: The model.
        tokenizer: The base model's tokenizer.
        index: The split.
        names: Categories to ask for; None takes those of the split. A name without objects in the split (one seen only
            in training, say) counts for presence and not for mAP.
        prompts: Category name -> prompt, where it is not the name.
        threshold: See `measure_split`.
        exhaustive: See `measure_split`.
        options: Those of `ask_split`.

    Raises:
        ImageError: An image cannot be read.
    """
    started = time.perf_counter()
    categories = prompted_categories(index, names, prompts)
    truth = build_ground_truth(index, categories)
    answers = ask_split(staged, tokenizer, index, categories, **options)
    metrics = measure_split(truth, answers, threshold=threshold, exhaustive=exhaustive)
    metrics.seconds = time.perf_counter() - started
    return metrics


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
