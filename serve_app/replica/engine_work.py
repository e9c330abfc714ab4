"""What the threads of a replica have the engine do: answer a batch, keep images, encode images ahead of their batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from sam3lora.cpus import usable_cpus
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.prompt import ClickAnswer
from sam3lora.engine.dense_slots import LabelledImage
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.selection import SmallDetections
from sam3lora.errors import UserError
from sam3lora.model.clicks.loading import has_click_head
from serve_app.replica.ahead import Ahead
from serve_app.settings import ServeSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClickedImage:
    """The objects of one request, which are all in one image, under one adapter."""

    objects: tuple[ClickedObject, ...]


Asked = PromptedImage | LabelledImage | ClickedImage | PreparedImage
"""An image that is asked for prompts, labels or clicked objects, or one to be kept."""

Answer = list[SmallDetections] | np.ndarray | tuple[ClickAnswer, ...] | PreparedImage
"""Detections of each prompt, logits (N, h, w) of the classes, masks of each object, or the image."""


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


def enable_clicks(engine: Engine, settings: ServeSettings) -> bool:
    """In the model thread: load the click head, if the settings or the base say so. Returns whether there is one.

    Raises:
        UserError: The settings ask for it, and the base has none, or a damaged one.
    """
    folder = engine.base.folder
    if settings.clicks is False or (settings.clicks is None and (folder is None or not has_click_head(folder))):
        return False
    try:
        engine.enable_clicks()
    except UserError as error:
        if settings.clicks:
            raise
        logger.warning("clicks are not answered: %s", error)
        return False
    return True


def run_batch(engine: Engine, asked: list[Asked]) -> list[Answer | Exception]:
    """In the model thread: uploaded images are encoded, the others answered together."""
    kept = [_keep(engine, one) if isinstance(one, PreparedImage) else None for one in asked]
    prompted = [one for one in asked if isinstance(one, PromptedImage)]
    dense = [one for one in asked if isinstance(one, LabelledImage)]
    clicked = [one for one in asked if isinstance(one, ClickedImage)]
    objects = [shown for one in clicked for shown in one.objects]
    labelled = iter(engine.label_small(dense, beside=[*prompted, *objects]) if dense else ())
    masks = iter(engine.click(objects, beside=prompted) if objects else ())
    detected = iter(engine.detect_small(prompted))
    found: list[Answer | Exception] = []
    for one, image in zip(asked, kept, strict=True):
        if image is not None:
            found.append(image)
        elif isinstance(one, ClickedImage):
            found.append(_all_or_first_error([next(masks) for _ in one.objects]))
        else:
            found.append(next(labelled if isinstance(one, LabelledImage) else detected))
    return found


def _all_or_first_error(answers: list[ClickAnswer | Exception]) -> tuple[ClickAnswer, ...] | Exception:
    good = tuple(one for one in answers if not isinstance(one, Exception))
    return good if len(good) == len(answers) else next(one for one in answers if isinstance(one, Exception))


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
        return [_with_image(one, image) for one, image in zip(asked, images, strict=True)]

    return Ahead(lacks_features, with_features, most=batching.max_images)


def _image_and_slot(asked: Asked) -> tuple[PreparedImage, int | None]:
    if isinstance(asked, PreparedImage):
        return asked, None
    if isinstance(asked, ClickedImage):
        first = asked.objects[0]
        return first.image, None if first.vision == "base" else first.slot
    return asked.image, asked.slot


def _with_image(asked: Asked, image: PreparedImage) -> Asked:
    if isinstance(asked, ClickedImage):
        return ClickedImage(tuple(replace(one, image=image) for one in asked.objects))
    return replace(asked, image=image) if isinstance(asked, PromptedImage) else image


def _keep(engine: Engine, image: PreparedImage) -> PreparedImage | Exception:
    try:
        engine.keep_image(image)
    except Exception as error:
        if is_out_of_memory(error) or is_device_error(error):
            raise
        return error
    return image
