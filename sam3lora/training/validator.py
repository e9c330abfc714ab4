"""Metrics of the adapter on the validation split while it trains; each worker asks its own share of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sam3lora.evaluation.ask.run import asked_categories
from sam3lora.evaluation.ask.split import ask_split
from sam3lora.evaluation.ask.split_results import Answers
from sam3lora.evaluation.metrics.ground_truth import build_ground_truth, prompted_categories
from sam3lora.evaluation.metrics.measure import measure_split
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.training import distributed

if TYPE_CHECKING:
    from sam3lora.config import Config
    from sam3lora.training.setup import Worker

LOGGED = ("map", "map_50", "map_75", "cgf1", "off_prompt_fpr", "presence_accuracy")


def evaluation_settings(config: Config) -> EvaluationSettings:
    """How a configuration wants its models measured."""
    evaluation, data, batch_size = config.evaluation, config.data, config.training.batch_size
    return EvaluationSettings(
        threshold=evaluation.threshold,
        nms_iou=evaluation.nms_iou,
        merge=evaluation.merge,
        merge_iou=evaluation.merge_iou,
        max_detections=evaluation.max_detections,
        num_samples=evaluation.num_samples,
        annotation_file=data.annotation_file,
        categories=data.categories,
        prompts=data.prompts,
        negative_prompts=data.negative_prompts,
        exhaustive=data.exhaustive,
        batch_size=EvaluationSettings.batch_size if batch_size == "auto" else batch_size,
        max_prompts_per_forward=config.training.max_prompts_per_forward,
    )


def validation_metrics(worker: Worker) -> dict[str, Any]:
    """`LOGGED` metrics over the split, or its first ``evaluation.num_samples`` images: what `validate` measures."""
    data, runner, settings = worker.data, worker.runner, evaluation_settings(worker.config)
    index = data.valid_complete
    assert index is not None
    rows = range(len(index))[: settings.num_samples]
    index = index.select_rows(rows)
    categories = asked_categories(index, settings) or prompted_categories(index, data.prompts)
    runner.text.add([category.prompt for category in categories])
    with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=runner.bf16):
        mine = ask_split(
            runner.staged,
            worker.tokenizer,
            index.select_rows(rows[distributed.rank() :: distributed.world_size()]),
            categories,
            resolution=data.valid_settings.resolution,
            post=settings.post_processing(),
            device=worker.device,
            batch_size=settings.batch_size,
            max_prompts_per_forward=settings.max_prompts_per_forward,
            text_cache=runner.text.kept(),
            encode=runner.images.of_records,
        )
    answers = Answers.join(distributed.gather_objects(mine), index.table.column("image_id").to_pylist())
    found = measure_split(
        build_ground_truth(index, categories), answers, threshold=settings.threshold, exhaustive=settings.exhaustive
    )
    return {name: getattr(found, name) for name in LOGGED}
