"""Metrics of the adapter on the validation split while it trains; each worker asks its own share of the images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Sam3Model

from sam3lora.engine.engine import Engine
from sam3lora.evaluation.ask.run import asked_categories
from sam3lora.evaluation.ask.split import ask_split
from sam3lora.evaluation.metrics.ground_truth import build_ground_truth, prompted_categories
from sam3lora.evaluation.metrics.measure import measure_split
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.split_results import SplitResults
from sam3lora.model.loading import LoadedBase
from sam3lora.training import distributed

if TYPE_CHECKING:
    from sam3lora.config import Config
    from sam3lora.training.setup import Worker

LOGGED = ("map", "map_50", "map_75", "cgf1", "off_prompt_fpr", "presence_accuracy")


def evaluation_settings(config: Config) -> EvaluationSettings:
    """The settings of a configuration for measuring its models."""
    data, batch_size = config.data, config.training.batch_size
    return EvaluationSettings(
        post=dict(config.evaluation.post_processing),
        num_samples=config.evaluation.num_samples,
        annotation_file=data.annotation_file,
        categories=data.categories,
        prompts=data.prompts,
        negative_prompts=data.negative_prompts,
        exhaustive=data.exhaustive,
        batch_size=EvaluationSettings.batch_size if batch_size == "auto" else batch_size,
        max_prompts_per_forward=config.training.max_prompts_per_forward,
    )


def validation_metrics(worker: Worker) -> dict[str, Any]:
    """`LOGGED` metrics over the split, or its first `evaluation.num_samples` images, as `validate` measures them."""
    data, runner, settings = worker.data, worker.runner, evaluation_settings(worker.config)
    post = worker.config.evaluation.post_processing
    index = data.valid_complete
    assert index is not None
    rows = range(len(index))[: settings.num_samples]
    index = index.select_rows(rows)
    categories = asked_categories(index, settings) or prompted_categories(index, data.prompts)
    runner.text.add([category.prompt for category in categories])
    with _evaluation_mode(worker.model), torch.no_grad():
        engine = _engine(worker, settings.max_prompts_per_forward)
        engine.keep_text(runner.text.kept())
        with torch.autocast(worker.device.type, dtype=torch.bfloat16, enabled=runner.bf16):
            mine = ask_split(
                engine,
                index.select_rows(rows[distributed.rank() :: distributed.world_size()]),
                categories,
                post=post,
                encode=runner.images.of_records,
                batch_size=settings.batch_size,
            )
    results = SplitResults.join(distributed.gather_objects(mine), index.table.column("image_id").to_pylist())
    found = measure_split(build_ground_truth(index, categories), results, post=post, exhaustive=settings.exhaustive)
    return {name: getattr(found, name) for name in LOGGED}


def _engine(worker: Worker, max_rows: int) -> Engine:
    """An engine on the model that is being trained, whose PEFT layers stay in it."""
    metadata, settings = worker.metadata, worker.data.valid_settings
    base = LoadedBase(
        model=cast(Sam3Model, worker.model.get_base_model()),
        tokenizer=worker.tokenizer,
        name=metadata.base_model or "",
        revision=metadata.base_revision,
        fingerprint=metadata.base_fingerprint or "",
        resolution=settings.resolution,
        image_mean=(0.5, 0.5, 0.5),  # not read: the features of the images come from training
        image_std=(0.5, 0.5, 0.5),
    )
    return Engine(
        base,
        precision="bfloat16" if worker.runner.bf16 else "float32",
        num_slots=1,
        image_cache_bytes=0,
        max_cached_prompts=10**6,
        max_rows=max_rows,
        geometry_cls=metadata.geometry_cls,
        in_training=True,
    )


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
