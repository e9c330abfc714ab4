"""Metrics of a model on one COCO split: every category is asked of every image."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from sam3lora.data.coco import CocoIndex
from sam3lora.data.images import read_image, resize_image
from sam3lora.evaluate.coco_map import MAX_DETECTIONS, CategoryMap, coco_map
from sam3lora.evaluate.ground_truth import PresenceTable, build_ground_truth, prompted_categories
from sam3lora.infer.detect import Instances, TextCache, detect_prompts
from sam3lora.model.forward import StagedSam3

PRESENCE_THRESHOLD = 0.5


@dataclass
class SplitMetrics:
    """What a model reaches on a split: values in [0, 1], None where nothing can be measured (`notes` say why).

    Attributes:
        map, map_50, map_75: Mask mAP over IoU 0.50:0.95, at 0.50 and at 0.75; no score cut, averaged over categories.
        presence_accuracy: Share of (image, prompt) pairs in which presence > 0.5 agrees with the annotations; pairs
            with crowd regions only are left out.
        per_category: Name -> its average precisions and number of objects.
        num_images, num_ground_truth: Images evaluated and objects to find.
        predictions: COCO results at the original size: image_id, category_id, segmentation, bbox (xywh), score.
        ground_truth: COCO dict that the predictions refer to, masks as compressed RLE.
        notes: What the numbers do not say by themselves.
        seconds: Wall clock.
    """

    map: float | None
    map_50: float | None
    map_75: float | None
    presence_accuracy: float | None
    per_category: dict[str, CategoryMap]
    num_images: int
    num_ground_truth: int
    predictions: list[dict[str, Any]] = field(repr=False)
    ground_truth: dict[str, Any] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The numbers alone, as JSON values."""
        values = {name: value for name, value in vars(self).items() if name not in ("predictions", "ground_truth")}
        return values | {"per_category": {name: asdict(entry) for name, entry in self.per_category.items()}}


def evaluate_split(
    staged: StagedSam3,
    tokenizer: Any,
    index: CocoIndex,
    *,
    resolution: int,
    names: Sequence[str] | None = None,
    prompts: Mapping[str, str] | None = None,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    max_prompts_per_forward: int = 8,
    progress: bool = False,
    text_cache: TextCache | None = None,
) -> SplitMetrics:
    """Detect every category in every image and compare with the annotations at their own size.

    Args:
        staged: The model, with or without an adapter; it is in evaluation mode meanwhile.
        tokenizer: The base model's tokenizer.
        index: The split.
        resolution: Side of the model's input in pixels.
        names: Categories to ask for; None takes those of the split. A name without objects in the split (one seen only
            in training, say) counts for presence and not for mAP.
        prompts: Category name -> prompt, where it is not the name.
        image_mean: Per channel, of pixels in [0, 1].
        image_std: Per channel.
        device: The model's device.
        batch_size: Images at a time.
        max_prompts_per_forward: (image, prompt) pairs at a time.
        progress: Show a progress bar on stderr.
        text_cache: Text features to use and add to, where the text tower is frozen.

    Raises:
        ImageError: An image cannot be read.
    """
    started = time.perf_counter()
    categories = prompted_categories(index, names, prompts)
    truth, presence, num_without_mask = build_ground_truth(index, categories)
    asked = [category.prompt for category in categories]
    predictions: list[dict[str, Any]] = []
    verdicts: list[bool] = []
    text_cache = {} if text_cache is None else text_cache
    console = Console(stderr=True, quiet=not (progress and sys.stderr.isatty()))
    with _evaluation_mode(staged.model), Progress(console=console, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(index))
        for start in range(0, len(index), batch_size):
            records = [index.record(row) for row in range(start, min(start + batch_size, len(index)))]
            pixel_values_ICHW = _read_pixels(records, resolution, image_mean, image_std, device)
            found = detect_prompts(
                staged,
                tokenizer,
                pixel_values_ICHW.to(next(staged.model.parameters()).dtype),
                asked,
                sizes_hw=[(record["height"], record["width"]) for record in records],
                max_detections=MAX_DETECTIONS,
                max_prompts_per_forward=max_prompts_per_forward,
                text_cache=text_cache,
            )
            for record, of_image in zip(records, found, strict=True):
                for category, instances in zip(categories, of_image, strict=True):
                    pair = (record["image_id"], category.id)
                    predictions += coco_results(instances, *pair)
                    verdicts += _presence_verdict(instances, pair, presence)
            bar.advance(task, len(records))
    result = coco_map(truth, predictions)
    num_ground_truth = sum(entry.num_ground_truth for entry in result.per_category.values())
    return SplitMetrics(
        map=result.map,
        map_50=result.map_50,
        map_75=result.map_75,
        presence_accuracy=sum(verdicts) / len(verdicts) if verdicts else None,
        per_category=result.per_category,
        num_images=len(index),
        num_ground_truth=num_ground_truth,
        predictions=predictions,
        ground_truth=truth,
        notes=_notes(num_ground_truth, num_without_mask, bool(verdicts)),
        seconds=time.perf_counter() - started,
    )


def coco_results(instances: Instances, image_id: int, category_id: int) -> list[dict[str, Any]]:
    """Detections as COCO results; the box is xywh in pixels."""
    return [
        {
            "image_id": image_id,
            "category_id": category_id,
            "segmentation": mask,
            "bbox": [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": float(score),
        }
        for mask, score, (x0, y0, x1, y1) in zip(instances.masks, instances.scores, instances.boxes_xyxy, strict=True)
    ]


def _read_pixels(
    records: Sequence[Mapping[str, Any]],
    resolution: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    device: torch.device | str,
) -> Tensor:
    """Normalised images (I, 3, resolution, resolution)."""
    images = [read_image(record["path"], expected_size_hw=(record["height"], record["width"])) for record in records]
    pixels_IHWC = np.stack([resize_image(image, (resolution, resolution)) for image in images])
    pixels_ICHW = torch.from_numpy(pixels_IHWC).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (image_mean, image_std))
    return (pixels_ICHW - mean) / std


def _presence_verdict(instances: Instances, pair: tuple[int, int], presence: PresenceTable) -> list[bool]:
    """Whether the model is right about presence; nothing where only crowd regions are annotated."""
    is_present = presence.get(pair, False)
    return [] if is_present is None else [(instances.presence > PRESENCE_THRESHOLD) == is_present]


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


def _notes(num_ground_truth: int, num_without_mask: int, presence_asked: bool) -> list[str]:
    notes = []
    if num_ground_truth == 0:
        notes.append("map is null: the split has no object with a mask")
    if not presence_asked:
        notes.append("presence_accuracy is null: nothing could be asked")
    if num_without_mask:
        notes.append(
            f"{num_without_mask} object(s) have a box and no mask: detections there count neither as right nor as wrong"
        )
    return notes
