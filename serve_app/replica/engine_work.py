"""What the threads of a replica have the engine do: answer a batch, keep images, encode images ahead of their batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sam3lora.cpus import usable_cpus
from sam3lora.engine.dense_slots import LabelledImage
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.selection import SmallDetections
from serve_app.replica.ahead import Ahead
from serve_app.settings import ServeSettings

Asked = PromptedImage | LabelledImage | PreparedImage
"""An image that is asked for prompts or for labels, or one to be kept."""

Answer = list[SmallDetections] | np.ndarray | PreparedImage
"""Detections of each prompt, logits (N, h, w) of the classes, or the image."""


def build_engine(settings: ServeSettings) -> Engine:
    if settings.torch_threads is not None:
        torch.set_num_threads(settings.torch_threads)
    return Engine.load(
        settings.model,
        revision=settings.revision,
        resolution=settings.resolution,
        precision=settings.precision,
        num_slots=settings.max_resident_adapters,
        max_rank=settings.max_adapter_rank,
        image_cache_bytes=settings.caches.images_mb * 2**20,
        max_cached_prompts=settings.caches.prompts,
        max_rows=settings.batching.max_rows,
        max_images=settings.batching.max_images,
        compile_vision=settings.compile_vision,
        cuda_graphs=settings.cuda_graphs,
        local_files_only=settings.local_files_only,
    )


def run_batch(engine: Engine, asked: list[Asked]) -> list[Answer | Exception]:
    """In the model thread: uploaded images are encoded, the others answered together."""
    kept = [_keep(engine, one) if isinstance(one, PreparedImage) else None for one in asked]
    prompted = [one for one in asked if isinstance(one, PromptedImage)]
    dense = [one for one in asked if isinstance(one, LabelledImage)]
    labelled = iter(engine.label_small(dense, beside=prompted) if dense else ())
    detected = iter(engine.detect_small(prompted))
    found: list[Answer | Exception] = []
    for one, image in zip(asked, kept, strict=True):
        answers = labelled if isinstance(one, LabelledImage) else detected
        found.append(next(answers) if image is None else image)
    return found


def encoding_ahead(engine: Engine, settings: ServeSettings) -> Ahead[Asked] | None:
    """Encodes the images of what waits, or None where that is not wanted.

    Where the settings do not say, it is wanted if the model has one thread and would leave cores idle.
    """
    batching = settings.batching
    is_wanted = batching.encode_ahead
    if is_wanted is None:
        is_wanted = torch.get_num_threads() == 1 and usable_cpus() > settings.most_replicas
    if not (is_wanted and engine.may_encode_ahead):
        return None

    def lacks_features(one: Asked) -> bool:
        return not isinstance(one, LabelledImage) and not engine.has_features(*_image_and_slot(one))

    def with_features(asked: list[Asked]) -> list[Asked]:
        images = engine.encode_ahead([_image_and_slot(one) for one in asked])
        return [
            replace(one, image=image) if isinstance(one, PromptedImage) else image
            for one, image in zip(asked, images, strict=True)
        ]

    return Ahead(lacks_features, with_features, most=batching.max_images)


def _image_and_slot(asked: Asked) -> tuple[PreparedImage, int | None]:
    return (asked, None) if isinstance(asked, PreparedImage) else (asked.image, asked.slot)


def _keep(engine: Engine, image: PreparedImage) -> PreparedImage | Exception:
    try:
        engine.keep_image(image)
    except Exception as error:
        if is_out_of_memory(error) or is_device_error(error):
            raise
        return error
    return image
