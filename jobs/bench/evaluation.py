"""Evaluation of a split to COCO results and mAP: one vision pass for all prompts of an image, against one for each."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import Sam3Config, Sam3Model, Sam3Processor
from transformers.utils.logging import disable_progress_bar

from jobs.bench.processes import Measured, Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from sam3lora.data.coco import CocoIndex
from sam3lora.data.images import read_annotated_image
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.evaluation.ask.worker import BASE, EvaluationWorker, Models
from sam3lora.evaluation.metrics.coco_map import MAX_DETECTIONS, coco_map
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory, SplitTruth, prompted_categories
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.model.base_folder import find_base

Result = dict[str, Any]
"""Image id, category id and score of each detection (sorted), and the mAP."""


def compare_evaluation(
    model_name: Literal["tiny", "small"] = "small", *, num_images: int = 2, num_prompts: int = 4, repeats: int = 2
) -> BenchReport:
    """Time an evaluation: from JPEG files to masks as run-length codes at the size of the image, and mask mAP.

    Both take the 100 best of every (image, prompt) pair without a score cut, as mAP wants them, and suppress nothing.
    The plain way is a stock forward and `post_process_instance_segmentation` for each pair, then pycocotools. Images
    have the side of the model's input.

    Args:
        model_name: "tiny", or "small" with random weights.
        num_images: Synthetic scenes.
        num_prompts: Prompts that each of them is asked.
        repeats: Rounds; the median counts.
    """
    from jobs.bench.serving_work import write_random

    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as name:
        folder = Path(name)
        disable_progress_bar()
        model = "tiny" if model_name == "tiny" else str(write_random(folder / "model", "small"))
        side = Sam3Config.from_pretrained(find_base(model).path).image_size
        data = write_dataset(
            folder / "data", num_train=1, num_valid=num_images, size=side, domain="base", progress=False
        )
        arguments = {"model": model, "split_dir": data / "valid", "num_prompts": num_prompts}
        ways = {"sam3lora": Work(make_ours, arguments), "transformers and pycocotools": Work(make_plain, arguments)}
        found = measure_in_turns(ways, rounds=repeats)
    return BenchReport(
        f"Evaluation of {num_images} images x {num_prompts} prompts, {model_name} at {side} pixels",
        [Timing(way, measured.median, measured.extra_mib) for way, measured in found.items()],
        _agreement(*found.values()),
    )


def make_ours(model: str, split_dir: Path, num_prompts: int) -> Round:
    """What `sam3lora validate` does with each batch of images, without the geometry CLS token that stock has not."""
    index, categories = _asked(split_dir, num_prompts)
    models = Models(options={"model": model, "geometry_cls": False, "device": "cpu", "local_files_only": True})
    worker = EvaluationWorker(models, categories, EvaluationSettings({"nms": "none", "max_detections": MAX_DETECTIONS}))
    records = [index.record(row) for row in range(len(index))]
    truth = SplitTruth(index, categories).to_coco()

    def evaluate() -> Result:
        found = [worker.results([record], [read_annotated_image(record)])[BASE] for record in records]
        predictions = [one for of_image in found for one in of_image.predictions]
        return _result(predictions, coco_map(truth, predictions, bbox=False).map)

    return evaluate


def make_plain(model: str, split_dir: Path, num_prompts: int) -> Round:
    """A stock forward for each pair."""
    index, categories = _asked(split_dir, num_prompts)
    folder = find_base(model).path
    processor = Sam3Processor.from_pretrained(folder, local_files_only=True)
    stock = Sam3Model.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    records = [index.record(row) for row in range(len(index))]
    truth = SplitTruth(index, categories).to_coco()

    @torch.inference_mode()
    def evaluate() -> Result:
        predictions = []
        for record in records:
            image = Image.open(record["path"]).convert("RGB")
            for category in categories:
                inputs = processor(images=image, text=category.prompt, return_tensors="pt")
                (found,) = processor.post_process_instance_segmentation(
                    stock(**inputs), threshold=0.0, target_sizes=[(image.height, image.width)]
                )
                ids = {"image_id": record["image_id"], "category_id": category.id}
                predictions += [ids | detection for detection in _as_coco(found)]
        return _result(predictions, _plain_map(truth, predictions))

    return evaluate


def _asked(split_dir: Path, num_prompts: int) -> tuple[CocoIndex, list[PromptedCategory]]:
    """The categories of the split, filled up with others that no image shows."""
    index = CocoIndex.from_folder(split_dir)
    names = [*index.names, *(f"thing number {number}" for number in range(num_prompts))]
    return index, prompted_categories(index, names[:num_prompts])


def _as_coco(found: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    best = found["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS]
    detections = []
    for score, box, mask in zip(*(found[name][best].numpy() for name in ("scores", "boxes", "masks")), strict=True):
        if not mask.any():  # nothing is found where no pixel is: `validate` leaves it out
            continue
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        x0, y0, x1, y1 = box.tolist()
        detections.append(
            {
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(score),
            }
        )
    return detections


def _plain_map(truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(one) for one in predictions]), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def _result(predictions: Sequence[Mapping[str, Any]], mean_average_precision: float | None) -> Result:
    scores = sorted((one["image_id"], one["category_id"], one["score"]) for one in predictions)
    return {"scores": scores, "map": mean_average_precision}


def _agreement(ours: Measured, plain: Measured) -> dict[str, Any]:
    first, second = ours.results[-1], plain.results[-1]
    pairs = list(zip(first["scores"], second["scores"], strict=False))
    same = len(first["scores"]) == len(second["scores"]) and all(one[:2] == other[:2] for one, other in pairs)
    return {
        "detections, sam3lora": len(first["scores"]),
        "detections, transformers": len(second["scores"]),
        "largest difference of scores": float(f"{max(abs(a[2] - b[2]) for a, b in pairs):.1e}") if same else None,
        "mAP, sam3lora": first["map"],
        "mAP, transformers": second["map"],
    }
