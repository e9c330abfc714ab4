"""The HTTP side of the service: every route, from a request to its answer. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sam3lora import __version__
from sam3lora.engine.detections import Instances
from serve_app.http.auth import keys_from_environment
from serve_app.http.body import read_request
from serve_app.http.envelope import Envelope, on_http_exception
from serve_app.http.errors import ServeError
from serve_app.http.formats import encode_results, is_costly, is_quick
from serve_app.http.openapi import TITLE, describe, operation
from serve_app.http.requests import IMAGE_ID_PREFIX, check_segment, check_upload, to_call
from serve_app.http.schemas import MaskFormat
from serve_app.http.web import add_pages
from serve_app.metrics import CONTENT_TYPE, IngressMetrics, merge
from serve_app.settings import ServeSettings

if TYPE_CHECKING:
    from serve_app.http.backend import Backend  # imports Ray

GRACE_S = 0.5  # for a backend to tell of its own what became of a request whose time is over

T = TypeVar("T")


def create_api(settings: ServeSettings, backend: Backend, *, sends_request_id: bool = True) -> FastAPI:
    """The HTTP application.

    Args:
        settings: Of the service. API keys are read from the environment variable that it names.
        backend: Who answers.
        sends_request_id: Whether to send the header `X-Request-ID`; Ray Serve does so by itself.

    Raises:
        UserError: The variable of API keys is set but holds none.
    """
    api = FastAPI(title=TITLE, version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = IngressMetrics()
    routes = _Routes(settings, backend, metrics)
    api.add_api_route("/v1/segment", routes.segment, methods=["POST"], **operation("segment"))
    api.add_api_route("/v1/images", routes.images, methods=["POST"], **operation("images"))
    api.add_api_route("/v1/adapters", routes.adapters, **operation("adapters"))
    api.add_api_route("/healthz", routes.healthz, **operation("healthz"))
    api.add_api_route("/readyz", routes.readyz, **operation("readyz"))
    api.add_api_route("/metrics", routes.metrics, **operation("metrics"))
    add_pages(api)
    describe(api, settings.limits)
    api.add_exception_handler(HTTPException, on_http_exception)
    known = frozenset(("/v1/segment", "/v1/images", "/v1/adapters", "/healthz", "/readyz", "/metrics", "/docs", "/"))
    keys = keys_from_environment(settings.api_keys_variable)
    api.add_middleware(Envelope, keys=keys, metrics=metrics, routes=known, sends_request_id=sends_request_id)
    return api


class _Routes:
    def __init__(self, settings: ServeSettings, backend: Backend, metrics: IngressMetrics) -> None:
        self._limits = settings.limits
        self._backend = backend
        self._metrics = metrics
        self._name = f"ingress-{uuid.uuid4().hex[:8]}"
        self._num_in_flight = 0
        self._max_in_flight = min(settings.limits.max_in_flight, settings.most_in_flight)
        # Apart from the threads that check requests, so that masks of large images do not hold up everyone.
        self._mask_threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="masks")

    async def segment(self, request: Request) -> Response:
        limits = self._limits
        stages = _Stages(request)
        async with self._admitted(request) as deadline_s:
            received = await read_request(request, limits.max_body_bytes)
            stages.end("body")
            asked, image = await asyncio.to_thread(check_segment, received, limits)
            stages.end("check")
            call = to_call(asked, image, _left(deadline_s))
            reply = _value(await _while_connected(request, self._backend.segment(call)))
            stages.end("segmenter")
            results = await self._format(request, reply.results, asked.masks, deadline_s + GRACE_S)
            stages.end("format")
        height, width = reply.size_hw
        head = {
            "request_id": request.state.request_id,
            "image": {"width": width, "height": height},
            "adapter": asked.adapter,
        }
        timing = json.dumps(stages.timing_ms(reply.timing_ms))
        return _json(f'{json.dumps(head)[:-1]}, "results": {results}, "timing_ms": {timing}}}')

    async def images(self, request: Request) -> Response:
        limits = self._limits
        stages = _Stages(request)
        async with self._admitted(request) as deadline_s:
            received = await read_request(request, limits.max_body_bytes)
            stages.end("body")
            image = await asyncio.to_thread(check_upload, received, limits)
            stages.end("check")
            reply = _value(await _while_connected(request, self._backend.keep_image(image.file, _left(deadline_s))))
            stages.end("segmenter")
        height, width = reply.size_hw
        answer = {
            "request_id": request.state.request_id,
            "image_id": IMAGE_ID_PREFIX + reply.key,
            "width": width,
            "height": height,
            "timing_ms": stages.timing_ms({}),
        }
        return _json(json.dumps(answer))

    async def adapters(self) -> Response:
        infos = _value(await self._backend.list_adapters())
        return _json(json.dumps({"adapters": [asdict(info) for info in infos]}))

    async def healthz(self) -> Response:
        return _json('{"status": "ok"}')

    async def readyz(self) -> Response:
        if not await self._backend.ready():
            raise ServeError("not_ready", "no segmenter is ready yet: try again in a few seconds", 2.0)
        return _json('{"status": "ready"}')

    async def metrics(self) -> Response:
        texts = {self._name: self._metrics.text(), **await self._backend.metrics()}
        return Response(await asyncio.to_thread(merge, texts), media_type=CONTENT_TYPE)

    async def _format(
        self, request: Request, results: Sequence[Instances], masks: MaskFormat, deadline_s: float
    ) -> str:
        if is_quick(results, masks):
            return encode_results(results, masks)
        gone = threading.Event()
        encode = partial(encode_results, results, masks, is_over=lambda: gone.is_set() or time.monotonic() > deadline_s)
        threads = self._mask_threads if is_costly(masks) else None
        try:
            return await _while_connected(request, asyncio.get_running_loop().run_in_executor(threads, encode))
        finally:
            gone.set()

    @contextlib.asynccontextmanager
    async def _admitted(self, request: Request) -> AsyncIterator[float]:
        """Bounds how many requests are worked on, and for how long; gives the time by which to answer.

        Raises:
            ServeError: There are too many, or the time is over.
        """
        limits = self._limits
        if self._num_in_flight >= self._max_in_flight:
            type = "too_many_requests" if limits.overload_status == 429 else "overloaded"
            raise ServeError(type, "more requests are under way than the service takes: try again later", 1.0)
        deadline_s = request.state.started_s + limits.timeout_s
        self._num_in_flight += 1
        try:
            async with asyncio.timeout(_left(deadline_s) + GRACE_S):
                yield deadline_s
        except TimeoutError:
            message = f"no answer within {limits.timeout_s:g} s: try again later, or with fewer prompts"
            raise ServeError("timeout", message) from None
        finally:
            self._num_in_flight -= 1


class _Stages:
    """Where the time of a request goes."""

    def __init__(self, request: Request) -> None:
        self._started_s = self._last_s = request.state.started_s
        self._ended: dict[str, float] = {}

    def end(self, stage: str) -> None:
        now_s = time.monotonic()
        self._ended[stage] = 1000 * (now_s - self._last_s)
        self._last_s = now_s

    def timing_ms(self, inner_ms: dict[str, float]) -> dict[str, float]:
        """With the stages within the segmenter, and the total so far."""
        total_ms = 1000 * (time.monotonic() - self._started_s)
        return {stage: round(ms, 3) for stage, ms in (self._ended | inner_ms | {"total": total_ms}).items()}


async def _while_connected(request: Request, answer: Awaitable[T]) -> T:
    """Await an answer; cancel it when the client goes away.

    Raises:
        ClientDisconnect: It did.
    """
    working, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _left(deadline_s: float) -> float:
    return max(0.0, deadline_s - time.monotonic())


def _value(answer: T | ServeError) -> T:
    if isinstance(answer, ServeError):
        raise answer
    return answer


def _json(text: str) -> Response:
    return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})
