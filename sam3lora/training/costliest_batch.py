"""The costliest batch of a training split, and its gradients, to measure what a run needs before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel
from torch import Tensor, nn

from sam3lora.data.batch import Batch
from sam3lora.data.coco import read_record
from sam3lora.data.index_columns import object_columns
from sam3lora.data.prompts import ALL_NEGATIVES, incomplete_prompts, prompt_key
from sam3lora.data.sample import DecodeSettings, record_queries
from sam3lora.model.staged.forward import VisionFeatures
from sam3lora.training.datasets import RunData
from sam3lora.training.features.encoder import ImageEncoder
from sam3lora.training.optimization import set_training_mode
from sam3lora.training.step import LossRunner, StepCounts
from sam3lora.training.task import Runner


@dataclass
class CostliestPrompts:
    """Computes gradients of images of the costliest kind, and discards them.

    The pixels are random. Each image has as many queries and objects as the image of the split that has most of them.
    """

    model: PeftModel
    runner: LossRunner
    data: RunData
    model_dropout: bool

    def __post_init__(self) -> None:
        self.num_queries, self._num_objects = most_queries_and_objects(self.data.train.table, self.data.train_settings)
        images = cast(ImageEncoder, _NoiseEncoder(self.runner.images, self.data.train_settings.features is not None))
        self._runner = replace(self.runner, images=images)

    def __call__(self, num_images: int, max_prompts: int) -> None:
        """For this number of images, with so many of their prompts at a time."""
        runner = replace(self._runner, max_prompts=max_prompts)
        # Objects are spread evenly over the queries of their image.
        queries, objects = self.num_queries, self._num_objects
        num_of_query = [objects // queries + (query < objects % queries) for query in range(queries)]
        batch = noise_batch(self.data, num_images, num_of_query)
        runs = runner.staged.runs_to_settle
        discard_gradients(self.model, runner, batch, model_dropout=self.model_dropout, runs=runs)


def noise_batch(data: RunData, num_images: int, num_of_query: Sequence[int] = ()) -> Batch:
    """Images of random pixels, each with these queries of so many objects with random masks, and no label map."""
    settings, queries, rng = data.train_settings, len(num_of_query), np.random.default_rng(0)
    num_B = np.array([*num_of_query] * num_images, dtype=np.int64)
    num_targets, mask_size, side = int(num_B.sum()), settings.mask_size, settings.resolution
    packed = None
    if mask_size is not None and num_targets:
        packed = rng.integers(0, 256, (num_targets, -(-mask_size * mask_size // 8)), dtype=np.uint8)
    return Batch(
        images_NHWC=rng.integers(0, 256, (num_images, side, side, 3), dtype=np.uint8),
        image_rows_N=np.arange(num_images),
        feature_keys_I=[None] * num_images,
        image_ids=np.arange(num_images),
        paths=[""] * num_images,
        original_sizes_hw=np.full((num_images, 2), side),
        query_image_B=np.repeat(np.arange(num_images), queries),
        # Different prompts on every image, as far as there are any: an adapted text tower encodes each one once.
        prompts_B=[data.prompts[row % len(data.prompts)] for row in range(queries * num_images)],
        num_B=num_B,
        exhaustive_B=np.ones(len(num_B), dtype=bool),
        boxes_cxcywh_T4=rng.uniform(0.25, 0.5, (num_targets, 4)).astype(np.float32),
        masks_packed=packed,
        mask_size=mask_size,
        mask_valid_T=np.full(num_targets, packed is not None),
        skipped=[],
    )


def discard_gradients(
    model: nn.Module, runner: Runner, batch: Batch, *, model_dropout: bool = False, runs: int = 1
) -> None:
    """Compute the gradients of a batch so many times, and leave the model without them, in evaluation mode.

    The next random numbers of the run are the same as without it.
    """
    set_training_mode(model, model_dropout=model_dropout)
    device = runner.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        runner.forget_graphs()
        try:
            for _ in range(runs):
                runner.backward(batch, StepCounts.of([batch]).normalizer())
        finally:
            runner.forget_graphs()
            model.zero_grad(set_to_none=True)
            model.eval()


@dataclass
class _NoiseEncoder:
    """Encodes a batch's images as `ImageEncoder` does for images it has seen before, without writing to its cache."""

    encoder: ImageEncoder
    from_cache: bool

    def of_batch(self, batch: Batch) -> VisionFeatures:
        encoder = self.encoder

        def pixel_values(row: int) -> Tensor:
            return encoder.pixel_values(batch.images_NHWC[row : row + 1])

        if not self.from_cache or encoder.trunk is None:
            with torch.set_grad_enabled(encoder.trainable):
                return encoder.staged.encode_images(encoder.pixel_values(batch.images_NHWC))
        tokens_ISC = encoder.trunk.fetch([None] * batch.num_images, pixel_values)
        with torch.set_grad_enabled(encoder.trainable):
            return encoder.rest(tokens_ISC)


def most_queries_and_objects(table: pa.Table, settings: DecodeSettings) -> tuple[int, int]:
    """The largest numbers of queries and of objects to match of any image in an epoch; at least 1."""
    prompts = {prompt_key(name): prompt for name, prompt in settings.prompts_map.items()}

    def key_of(category: str) -> str:
        return prompt_key(prompts.get(prompt_key(category), category))

    objects = object_columns(table)
    rows, _, num_of_query, _ = objects.count_pairs(key_of, ~objects.crowd_T)
    if settings.max_objects is not None:
        num_of_query = np.minimum(num_of_query, settings.max_objects)
    num_objects_I = np.bincount(rows, num_of_query, minlength=objects.num_images)
    # What an image shows is asked first, then negatives of what it is known not to show, as far as there are any.
    num_positives_I = np.bincount(rows, minlength=objects.num_images)
    incomplete = incomplete_prompts(settings.names, settings.prompts_map, settings.exhaustive)
    complete = {key_of(name) for name in settings.names} - incomplete
    shown_rows, positions, _, keys = objects.count_pairs(key_of)
    is_complete = np.array([key in complete for key in keys], dtype=bool)
    num_shown_I = np.bincount(shown_rows[is_complete[positions]], minlength=objects.num_images)
    num_absent_I = len(complete) - num_shown_I
    sampled = settings.num_negatives
    every_one = sampled is None or sampled == ALL_NEGATIVES
    num_negatives_I = num_absent_I if every_one else np.minimum(num_absent_I, sampled or 0)
    row = int((num_positives_I + num_negatives_I).argmax())
    queries = record_queries(read_record(table, row), settings)
    return max(1, len(queries)), max(1, int(num_objects_I.max()))
