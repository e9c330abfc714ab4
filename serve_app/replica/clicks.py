"""Clicked objects in a replica: what the click head is asked, its answers at full size, and the masks that are kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.masks import decode_mask
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.kept_masks import MOST_MASKS
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt, drawn_mask_logits
from sam3lora.engine.engine import Engine
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.mask_codes import encode_logits
from sam3lora.engine.selection import SmallDetections
from sam3lora.errors import UserError
from sam3lora.model.clicks.origin import ClickOrigin
from serve_app.http.errors import ServeError, answer_too_large
from serve_app.messages import RefineCall, RefinedMask, RefinedMasks, RefinedObject
from serve_app.replica.adapter_store import HeldAdapter
from serve_app.replica.engine_work import ClickedImage
from serve_app.replica.mask_encoder import StoppedError
from serve_app.replica.tasks import expect


def click_slots(
    engine: Engine, call: RefineCall, adapter: HeldAdapter, click_adapter: HeldAdapter
) -> tuple[int | None, int | None]:
    """The slots of the two adapters of a call, which go together.

    Raises:
        ServeError: One is of another task, or the click adapter was trained on another vision trunk.
    """
    if call.adapter is not None:
        expect(PostProcessing, call.adapter, adapter.settings)
    if call.click_adapter is not None:
        expect(ClickOrigin, call.click_adapter, click_adapter.settings, "click_adapter")
    try:
        engine.check_clicks(None if call.clicks_vision == "base" else adapter.slot, click_adapter.slot)
    except UserError as error:
        raise ServeError("invalid_adapter", str(error), field="click_adapter") from None
    return adapter.slot, click_adapter.slot


def to_clicked(
    engine: Engine,
    call: RefineCall,
    image: PreparedImage,
    slot: int | None,
    click_slot: int | None,
    stop: threading.Event,
) -> ClickedImage:
    """What the engine is asked. Masks that came as run-length codes take milliseconds: use a thread then.

    Raises:
        ServeError: A mask is not kept, or no longer.
        StoppedError: `stop` is set.
    """
    side = engine.click_mask_side
    objects = []
    for number, one in enumerate(call.objects):
        if stop.is_set():
            raise StoppedError
        mask_mm = _start(engine, one, image, side, f"objects[{number}].mask.mask_id")
        prompt = ClickPrompt.of(one.clicks, one.box_xyxy, mask_mm, size_hw=image.size_hw, side=engine.resolution)
        if call.multimask is not None:
            prompt = replace(prompt, multimask=call.multimask)
        objects.append(ClickedObject(image, prompt, slot, call.clicks_vision, click_slot))
    return ClickedImage(tuple(objects))


def _start(engine: Engine, asked: RefinedObject, image: PreparedImage, side: int, field: str) -> Tensor | None:
    """The logits (side, side) that an object starts from."""
    if asked.mask is None:
        return None
    if not isinstance(asked.mask, str):
        return drawn_mask_logits(decode_mask(asked.mask, image.size_hw), side)
    kept = engine.kept_mask(image.key, asked.mask)
    if kept is None:
        message = f"{field} is not kept with this image, or no longer: send the mask itself, or the clicks alone"
        raise ServeError("mask_not_found", message, field=field)
    return torch.from_numpy(kept.astype(np.float32))


def refined_masks(
    engine: Engine,
    call: RefineCall,
    answers: Sequence[ClickAnswer],
    image: PreparedImage,
    most_bytes: int,
    stop: threading.Event,
) -> list[RefinedMasks]:
    """The masks of each object at full size, kept beside the image as they were before the cleaning.

    In a thread; can stop between two masks.

    Raises:
        ServeError: They have more than `most_bytes`.
        StoppedError: `stop` is set.
    """
    found = []
    num_bytes = 0
    for asked, answer in zip(call.objects, answers, strict=True):
        by_score = sorted(range(len(answer.scores)), key=lambda index: (index != answer.chosen, -answer.scores[index]))
        masks = []
        for index in by_score:
            if stop.is_set():
                raise StoppedError
            logits_mm = answer.logits_Mmm[index].numpy()
            cleaned_mm = call.cleaning.clean(logits_mm, asked.clicks, image.size_hw)
            rle = encode_logits(cleaned_mm, image.size_hw)
            num_bytes += len(rle["counts"])
            if num_bytes > most_bytes:
                raise answer_too_large(num_bytes, most_bytes, "ask for fewer objects")
            masks.append(RefinedMask(answer.scores[index], rle, engine.keep_mask(image.key, logits_mm)))
        found.append(RefinedMasks(masks, answer.object_score))
    return found


def keep_detections(engine: Engine, results: Sequence[SmallDetections], image: PreparedImage) -> list[list[str | None]]:
    """Keep the masks of detections; returns their ids, in the order of the detections at full size.

    The best are kept, as many as an image has room for. Takes milliseconds: use a thread.
    """
    rows = [(number, row) for number, small in enumerate(results) for row in small.rows_seen()]
    best = sorted(rows, key=lambda place: -results[place[0]].scores_N[place[1]])[:MOST_MASKS]
    ids: dict[tuple[int, int], str | None] = {}
    for number, row in reversed(best):  # the best last: what is kept later pushes out what was kept before
        logits_NHW = results[number].mask_logits_NHW
        assert logits_NHW is not None, "asked for without masks"
        ids[number, row] = engine.keep_mask(image.key, logits_NHW[row])
    found: list[list[str | None]] = [[] for _ in results]
    for number, row in rows:
        found[number].append(ids.get((number, row)))
    return found
