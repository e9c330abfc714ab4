"""A service that answers as a test wrote it down, on a clock that only waiting moves."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
from collections.abc import Callable
from email.parser import BytesParser
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lora.client import AsyncClient, Client

URL = "http://service.test"
MASK_HW = np.zeros((4, 6), dtype=bool)
MASK_HW[1:3, 2:5] = True


def rle(mask_HW: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def png_text(mask_HW: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask_HW.astype(np.uint8) * 255).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


MASKS: dict[str, Any] = {"rle": rle(MASK_HW), "polygon": [[2, 1, 5, 1, 5, 3, 2, 3]], "png": png_text(MASK_HW)}


def answer(request: dict[str, Any], size_hw: tuple[int, int] = (4, 6)) -> dict[str, Any]:
    """One detection of the first prompt, none of the others."""
    masks = request.get("masks", "rle")
    found = {"score": 0.9, "box_xyxy": [2.0, 1.0, 5.0, 3.0]}
    if masks != "none":
        found |= {"area_px": 6, "mask": MASKS[masks]}
    results = [
        {"prompt": prompt, "presence": 0.8, "num_detections": int(not row), "detections": [] if row else [found]}
        for row, prompt in enumerate(request["prompts"])
    ]
    return {
        "request_id": "r1",
        "image": {"width": size_hw[1], "height": size_hw[0]},
        "adapter": request.get("adapter"),
        "results": results,
        "timing_ms": {"model": 1.5, "total": 2.5},
    }


def fault(status: int, kind: str = "some_type", **headers: str) -> httpx.Response:
    error = {"type": kind, "message": "a message", "request_id": "r7"}
    return httpx.Response(status, json={"error": error}, headers=headers)


def parts_of(request: httpx.Request) -> dict[str, bytes]:
    """The parts of a multipart body by name."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + request.content)
    return {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
        for part in message.get_payload()
    }


class Script:
    """Answers one after the other (the last for good), the requests seen, and a clock that only waiting moves."""

    def __init__(self, *answers: httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.waits: list[float] = []
        self.now = 100.0

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(request)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)

    def client(self, kind: type, **settings: Any) -> EitherClient:
        sleep = self.sleep if kind is Client else self.sleep_async
        transport = httpx.MockTransport(self.handle)
        return EitherClient(kind(URL, transport=transport, sleep=sleep, clock=lambda: self.now, **settings))


class EitherClient:
    """A client of either kind, called as the one without an event loop."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            value = getattr(self.client, name)(*args, **kwargs)
            return asyncio.run(value) if inspect.isawaitable(value) else value

        return call


def segmented(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=answer(json.loads(parts_of(request)["request"])))
