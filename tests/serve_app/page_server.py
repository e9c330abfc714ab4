"""A stand-in for the service behind the web page: the HTTP contract, with answers known in advance.

Prompts make it behave: "many" has 200 detections, "dust" has one without pixels, "busy" is refused once, "slow" waits
until it is let go, "broken" fails, more than 32 words are refused, and the base model finds no "pothole"; every other
prompt but "nothing" has the three detections of `canned`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, File, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from pycocotools import mask as coco_mask
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import serve_app
from sam3lora.config.post_processing import PostProcessing
from serve_app.http.envelope import SECURITY_HEADERS
from serve_app.http.ingress import create_api
from serve_app.settings import ServeSettings

from .browser import wait_until
from .http_cases import FakeBackend

STATIC = Path(serve_app.__file__).parent / "static"
POST = PostProcessing(nms_iou=0.5, max_detections=200)
ADAPTERS = [
    {"id": "road", "prompts": ["pothole"], "post_processing": POST.changed(threshold=0.2, nms="none").model_dump()},
    {"id": "shapes", "prompts": ["gear", "arrow"], "post_processing": POST.model_dump()},
    {"id": "torn", "prompts": [], "post_processing": None, "error": "adapter_config.json is missing"},
]
MOST_CLICKS = 6  # on one object
Answer = Callable[[np.ndarray, dict[str, Any]], list[dict[str, Any]]]


def detection(score: float, box_xyxy: tuple[int, int, int, int], size_hw: tuple[int, int]) -> dict[str, Any]:
    """A full rectangle with a hole of one pixel, so that its mask has a structure."""
    mask = np.zeros(size_hw, np.uint8, order="F")
    x0, y0, x1, y1 = box_xyxy
    mask[y0:y1, x0:x1] = 1
    mask[(y0 + y1) // 2, (x0 + x1) // 2] = 0
    rle = coco_mask.encode(mask)
    rle = {"size": list(size_hw), "counts": rle["counts"].decode("ascii")}
    return {"score": score, "box_xyxy": list(box_xyxy), "area_px": int(mask.sum()), "mask": rle}


def canned(image: np.ndarray, question: dict[str, Any]) -> list[dict[str, Any]]:
    """0.9 and 0.7 overlap by an IoU of 0.6, 0.3 lies apart; an adapter adds a detection at 0.8."""
    size_hw = image.shape[:2]
    unit = min(size_hw) // 20
    boxes = [(0.9, (1, 1, 9, 9)), (0.8, (1, 11, 5, 15)), (0.7, (3, 1, 11, 9)), (0.3, (12, 12, 18, 18))]
    if question["adapter"] is None:
        del boxes[1]
    if question.get("merge"):  # no union of the others: only the service can know it
        boxes = [(0.9, (1, 1, 12, 10))]
    few = [detection(score, tuple(unit * side for side in box), size_hw) for score, box in boxes]
    many = [
        detection(0.99 - 0.004 * number, (10 + number % 20 * 8, 10 + number // 20 * 8, 16 + number % 20 * 8,
                  16 + number // 20 * 8), size_hw)
        for number in range(200)
    ]  # fmt: skip
    results = []
    for prompt in question["prompts"] or ["visual"]:
        found = {"nothing": [], "many": many, "dust": [few[0], detection(0.6, (5, 5, 5, 5), size_hw)]}.get(prompt, few)
        if prompt == "pothole" and question["adapter"] is None:
            found = []
        results.append({"prompt": prompt, "presence": 0.75, "num_detections": len(found), "detections": found})
    return results


def clicked(size_hw: tuple[int, int], asked: dict[str, Any], *, fills_holes: bool = False) -> dict[str, Any]:
    """The box, or else what encloses the clicks inside by 12 pixels; cut off to the right of the clicks outside.

    The hole may be filled; the ids of masks do not tell.
    """
    inside = np.array([(one["x"], one["y"]) for one in asked["clicks"] if one["label"]]).reshape(-1, 2)
    x0, y0, x1, y1 = asked["box"] or (*(inside.min(0) - 12), *(inside.max(0) + 12))
    x1 = min([x1, *(one["x"] for one in asked["clicks"] if not one["label"])])
    box = tuple(int(min(max(side, 0), most)) for side, most in zip((x0, y0, x1, y1), 2 * size_hw[::-1], strict=True))

    def mask(score: float, smaller: int) -> dict[str, Any]:
        found = detection(score, (box[0] + smaller, box[1] + smaller, box[2] - smaller, box[3] - smaller), size_hw)
        kept = {"mask_id": "msk_" + hashlib.md5(json.dumps(found).encode()).hexdigest()}
        if fills_holes:
            filled = coco_mask.decode(found["mask"])
            filled[(box[1] + box[3]) // 2, (box[0] + box[2]) // 2] = 1
            found["mask"]["counts"] = coco_mask.encode(filled)["counts"].decode("ascii")
            found["area_px"] += 1
        return found | kept

    is_single = len(asked["clicks"]) == 1 and not asked["box"] and not asked["mask"]
    return mask(0.85, 0) | {"object_score": 0.99, "alternatives": [mask(0.5, 4), mask(0.4, 8)] if is_single else []}


class PageServer:
    """What the page was told and asked.

    Args:
        answer: From an RGB image and a request to `results`.
        adapters: What GET /v1/adapters says; may be changed while it runs.
        api_key: Asked of every call if given.
        clicks: Whether it answers POST /v1/refine.

    Attributes:
        questions: Requests to segment, without those refused for a prompt.
        refined: Requests to refine.
        holds_refined: Whether they wait for their answers.
        listings: Query parameters of GET /v1/adapters.
    """

    def __init__(
        self,
        answer: Answer = canned,
        adapters: list[dict] = ADAPTERS,
        api_key: str | None = None,
        *,
        clicks: bool = False,
    ) -> None:
        self.questions: list[dict[str, Any]] = []
        self.refined: list[dict[str, Any]] = []
        self.holds_refined = False
        self.keeps_masks = True
        self.listings: list[dict[str, str]] = []
        self.adapters = adapters
        self.num_uploads = 0
        self.num_given_up = 0
        self.images: dict[str, np.ndarray] = {}
        self.url = ""
        self._was_busy = False
        self._let_go = threading.Event()
        self.app = app = FastAPI(openapi_url=None)

        app.add_middleware(_Policy)

        @app.get("/")
        def page() -> FileResponse:
            return FileResponse(STATIC / "index.html")

        @app.get("/openapi.json")
        def description() -> dict[str, Any]:
            return create_api(ServeSettings(), FakeBackend()).openapi()

        @app.get("/v1/adapters")
        def list_adapters(
            request: Request, search: str = "", limit: int = 1000, after: str = "", task: str = "detection"
        ) -> Any:
            if api_key and request.headers.get("X-API-Key") != api_key:
                return _error(401, "unauthorized", "send Authorization: Bearer KEY")
            self.listings.append(dict(request.query_params))
            found = [
                adapter
                for adapter in self.adapters
                if any(search.lower() in text.lower() for text in (adapter["id"], *adapter["prompts"]))
                and adapter.get("task", "detection") == task
            ]
            page = [adapter for adapter in found if adapter["id"] > after][:limit]
            is_last = not page or page[-1] is found[-1]
            return {
                "adapters": page,
                "total": len(found),
                "next": None if is_last else page[-1]["id"],
                "base_post_processing": POST.model_dump(),
                "clicks": clicks,
                "request_id": "a1",
            }

        @app.post("/v1/images")
        async def keep(image: UploadFile = File()) -> dict[str, Any]:  # noqa: B008
            data = await image.read()
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            key = "img_" + hashlib.sha256(data).hexdigest()
            self.images[key] = pixels
            self.num_uploads += 1
            return {"image_id": key, "width": pixels.shape[1], "height": pixels.shape[0]}

        @app.post("/v1/segment")
        async def segment(request: Request) -> Any:
            question = await request.json()
            for number, prompt in enumerate(question["prompts"]):
                if len(prompt.split()) > 32:
                    message = f"prompts[{number}] has more than 32 tokens: shorten it"
                    return _error(422, "invalid_prompt", message, field=f"prompts[{number}]")
            self.questions.append(question)
            image = self.images.get(question["image_id"])
            if image is None:
                return _error(404, "image_not_found", "no such image")
            if "busy" in question["prompts"] and not self._was_busy:
                self._was_busy = True
                return _error(503, "overloaded", "too many requests wait", {"Retry-After": "1"})
            if "broken" in question["prompts"]:
                return _error(500, "internal", "something failed in the service")
            while "slow" in question["prompts"] and not self._let_go.is_set():
                if await request.is_disconnected():
                    self.num_given_up += 1
                    return None
                await asyncio.sleep(0.02)
            return {
                "request_id": f"r{len(self.questions)}",
                "image": {"width": image.shape[1], "height": image.shape[0]},
                "adapter": question["adapter"],
                "results": self._post_process(question, await asyncio.to_thread(answer, image, question)),
                "timing_ms": {"decode": 1.5, "model": 12.0, "total": 14.25},
            }

        @app.post("/v1/refine")
        async def refine(request: Request) -> Any:
            question = await request.json()
            self.refined.append(question)
            while self.holds_refined:
                await asyncio.sleep(0.02)
            image = self.images.get(question["image_id"])
            if image is None:
                return _error(404, "image_not_found", "no such image")
            (asked,) = question["objects"]
            if not self.keeps_masks and "mask_id" in (asked["mask"] or {}):
                return _error(404, "mask_not_found", "no such mask")
            if len(asked["clicks"]) > MOST_CLICKS:
                return _error(422, "invalid_click", "too many clicks", field="objects[0].clicks")
            return {
                "request_id": "r",
                "image": {"width": image.shape[1], "height": image.shape[0]},
                "adapter": question["adapter"],
                "objects": [clicked(image.shape[:2], asked, fills_holes=question["max_hole_area"] > 0)],
                "timing_ms": {"total": 4.5},
            }

        app.mount("/static", StaticFiles(directory=STATIC))

    def _post_process(self, question: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        recorded = [adapter["post_processing"] for adapter in self.adapters if adapter["id"] == question["adapter"]]
        settings = {**(recorded[0] if recorded else POST.model_dump()), **question}
        for result in results:
            kept: list[dict[str, Any]] = []
            for found in result["detections"]:
                rivals = [better["mask"] for better in kept] if settings["nms"] != "none" else []
                overlaps = coco_mask.iou([found["mask"]], rivals, [0] * len(rivals)) if rivals else np.zeros(1)
                if found["score"] >= settings["threshold"] and np.max(overlaps) <= settings["nms_iou"]:
                    kept.append(found)
                    if question.get("keep_masks"):
                        found["mask_id"] = "msk_" + hashlib.md5(found["mask"]["counts"].encode()).hexdigest()
            result.update(detections=kept[: settings["max_detections"]], num_detections=len(kept))
        return results

    def forget_images(self) -> None:
        """As if the service had been started again."""
        self.images.clear()

    @contextmanager
    def running(self, port: int = 0) -> Iterator[PageServer]:
        """Serve on 127.0.0.1; port 0 takes a free one."""
        with serving(self.app, port) as self.url:
            try:
                yield self
            finally:
                self._let_go.set()


@contextmanager
def serving(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """The address of an application that a thread serves on 127.0.0.1."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server to start")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


class _Policy:
    """Puts the service's security headers on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _error(
    status: int, kind: str, message: str, headers: dict[str, str] | None = None, field: str | None = None
) -> JSONResponse:
    error = {"type": kind, "message": message, "request_id": "req-42", "field": field}
    return JSONResponse({"error": error}, status, {"X-Request-ID": "req-42", **(headers or {})})
