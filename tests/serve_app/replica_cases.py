"""A replica with a real small model: adapters, requests, a model that can be held, and what is asked of replies."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3lora.engine.detections import Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.selection import SmallDetections
from sam3lora.model.loading import LoadedBase
from serve_app.http.errors import ServeError
from serve_app.messages import ImageFile, SegmentCall, SegmentReply
from serve_app.replica.replica import ModelReplica

from ..engine.engine_cases import write_adapter

LONG_S = 60.0
POST = {"threshold": 0.0, "max_detections": 3}


def write_root(root: Path, spread_base: Path) -> Path:
    """Two adapters and a broken one in a folder."""
    write_adapter(root / "towers", spread_base, "vision", 1)
    write_adapter(root / "heads", spread_base, "no cls", 2)
    write_adapter(root / "broken", spread_base, "text", 3)
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"junk")
    return root


def image(seed: int = 0, size_hw: tuple[int, int] = (60, 90), orientation: int = 1) -> ImageFile:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    return ImageFile(hashlib.sha256(file.getvalue()).hexdigest(), file.getvalue())


def call(seed: int = 0, prompts: tuple[str, ...] = ("crack",), **options: Any) -> SegmentCall:
    return SegmentCall(image(seed), prompts, **({"post_processing": POST, "timeout_s": LONG_S} | options))


class Gate(Engine):
    """The real model; while closed, `detect_small` waits with the batch in hand."""

    def __init__(self, base: LoadedBase, **options: Any) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[PromptedImage]] = []
        self.decoded: list[str] = []
        self.error: Callable[[list[PromptedImage]], Exception | None] = lambda images: None
        super().__init__(base, **options)

    def warm_up(self) -> None:
        pass

    def prepare_image(self, data: Any, key: str, **options: Any) -> Any:
        self.decoded.append(key)
        return super().prepare_image(data, key, **options)

    def detect_small(self, images: Any) -> list[list[SmallDetections] | Exception]:
        if images:
            self.batches.append(list(images))
            self.entered.release()
            assert self.open.wait(LONG_S)
            if error := self.error(images):
                raise error
        return super().detect_small(images)

    async def busy(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=LONG_S)

    async def occupy(self, service: ModelReplica, seed: int = 0) -> asyncio.Task[SegmentReply]:
        """The model has the batch of a first request in hand, until `open` is set."""
        self.open.clear()
        first = asyncio.create_task(answered(service, call(seed)))
        await self.busy()
        return first


async def answered(service: ModelReplica, one: SegmentCall) -> SegmentReply:
    reply = await service.segment(one)
    assert isinstance(reply, SegmentReply), reply
    return reply


async def refused(service: ModelReplica, one: SegmentCall) -> ServeError:
    reply = await service.segment(one)
    assert isinstance(reply, ServeError), reply
    return reply


async def metric(service: ModelReplica, name: str) -> int:
    found = re.search(rf"^sam3lora_{name} (.+)$", (await service.named_metrics())[1], re.MULTILINE)
    assert found, name
    return int(float(found[1]))


async def until_queued(service: ModelReplica, num: int) -> None:
    """So many prepared requests wait for the model."""
    await until(lambda: service._batcher.queue_length == num)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def assert_same(found: Any, expected: list[Detections]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.prompt, one.size_hw, len(one)) == (other.prompt, other.size_hw, len(other))
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=1e-3)
        assert (one.rles is None) == (other.rles is None)
        if one.rles is not None:
            np.testing.assert_allclose(one.areas_px, other.areas_px, atol=5)
