"""The HTTP routes and pages of the service, from a request to its response, independent of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from sam3lora import __version__
from serve_app.http.arrivals import Admission
from serve_app.http.auth import keys_from_environment
from serve_app.http.body import Received, read_request
from serve_app.http.dense import check_dense, dense_response, to_dense_call
from serve_app.http.envelope import Envelope, on_http_exception
from serve_app.http.errors import ServeError, answer_too_large
from serve_app.http.formats import is_costly, is_quick, segment_response
from serve_app.http.listing import adapters_json, check_listing
from serve_app.http.openapi import TITLE, describe, operation
from serve_app.http.refine import check_refine, refine_response, to_refine_call
from serve_app.http.requests import IMAGE_ID_PREFIX, check_segment, check_upload, to_call
from serve_app.http.schemas import ImageResponse, StatusResponse
from serve_app.http.writing import Writing
from serve_app.metrics import CONTENT_TYPE, IngressMetrics, StageClock, merge
from serve_app.settings import Limits, ServeSettings

if TYPE_CHECKING:
    from serve_app.http.backend import Backend  # its module imports Ray

GRACE_S = 0.5  # for the backend to say itself what happened to a request whose time is over

T = TypeVar("T")
Asked = TypeVar("Asked")
Reply = TypeVar("Reply")


def create_api(settings: ServeSettings, backend: Backend, *, sends_request_id: bool = True) -> FastAPI:
    """The HTTP application, with API keys from the environment variable that the settings name.

    Raises:
        UserError: The variable of API keys is set but holds none.
    """
    api = FastAPI(title=TITLE, version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = IngressMetrics()
    routes = _Routes(settings, backend, metrics)
    api.add_api_route("/v1/segment", routes.segment, methods=["POST"], **operation("segment"))
    api.add_api_route("/v1/dense", routes.dense, methods=["POST"], **operation("dense"))
    api.add_api_route("/v1/refine", routes.refine, methods=["POST"], **operation("refine"))
    api.add_api_route("/v1/images", routes.images, methods=["POST"], **operation("images"))
    api.add_api_route("/v1/adapters", routes.adapters, **operation("adapters"))
    api.add_api_route("/healthz", routes.healthz, **operation("healthz"))
    api.add_api_route("/readyz", routes.readyz, **operation("readyz"))
    api.add_api_route("/metrics", routes.metrics, **operation("metrics"))
    api.state.drain = routes.drain
    add_pages(api)
    describe(api, settings.limits)
    api.add_exception_handler(HTTPException, on_http_exception)
    asked = ("/v1/segment", "/v1/dense", "/v1/refine", "/v1/images", "/v1/adapters")
    paths = (*asked, "/healthz", "/readyz", "/metrics", *PAGES)
    keys = keys_from_environment(settings.api_keys_variable)
    api.add_middleware(
        Envelope,
        keys=keys,
        metrics=metrics,
        allowed_hosts=settings.allowed_hosts,
        cors_origins=settings.cors_origins,
        routes=frozenset(paths),
        sends_request_id=sends_request_id,
    )
    return api


class _Routes:
    def __init__(self, settings: ServeSettings, backend: Backend, metrics: IngressMetrics) -> None:
        self._limits = settings.limits
        self._backend = backend
        self._metrics = metrics
        self._name = f"ingress-{uuid.uuid4().hex[:8]}"
        self._closing = False
        self._admission = Admission(settings)
        # A pool of its own: masks of large images must not delay the checks of other requests.
        self._mask_threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="masks")

    async def segment(self, request: Request) -> Response:
        return await self._ask(
            request,
            check_segment,
            lambda asked, timeout_s: self._backend.segment(to_call(*asked, timeout_s)),
            lambda asked, reply, writing: segment_response(reply, asked[0], writing),
            is_quick=lambda asked, reply: is_quick(reply.results, asked[0].masks),
            is_costly=lambda asked: is_costly(asked[0].masks),
        )

    async def dense(self, request: Request) -> Response:
        return await self._ask(
            request,
            check_dense,
            lambda asked, timeout_s: self._backend.label(to_dense_call(*asked, timeout_s)),
            lambda asked, reply, writing: dense_response(reply, asked[0], writing),
            advice="ask for fewer classes",
        )

    async def refine(self, request: Request) -> Response:
        return await self._ask(
            request,
            check_refine,
            lambda asked, timeout_s: self._backend.refine(to_refine_call(*asked, timeout_s)),
            lambda asked, reply, writing: refine_response(reply, asked[0], writing),
            is_quick=lambda asked, reply: not is_costly(asked[0].masks),
            is_costly=lambda asked: is_costly(asked[0].masks),
            advice="ask for fewer objects",
        )

    async def _ask(
        self,
        request: Request,
        check: Callable[[Received, Limits], Asked],
        send: Callable[[Asked, float], Awaitable[Reply | ServeError]],
        respond: Callable[[Asked, Reply, Writing], BaseModel],
        *,
        is_quick: Callable[[Asked, Reply], bool] = lambda asked, reply: False,
        is_costly: Callable[[Asked], bool] = lambda asked: False,
        advice: str | None = None,
    ) -> Response:
        """From a request about an image to its response.

        Args:
            check: What is asked, from what was received.
            send: Asks the replicas, within so many seconds.
            respond: The body, from what was asked and the reply.
            is_quick: Whether the body is written in less time than a thread is worth.
            is_costly: Whether one mask may take a second.
            advice: What to do where the response is too large.
        """
        clock = StageClock(request.state.started_s)
        async with self._admitted(request) as (incoming, deadline_s):
            received = await read_request(incoming, self._limits.max_body_bytes)
            clock.lap("body")
            asked = await asyncio.to_thread(check, received, self._limits)
            clock.lap("check")
            reply = _value(await _while_connected(request, send(asked, _left(deadline_s))))
            clock.lap("segmenter")

            def to_json(is_over: Callable[[], bool]) -> str:
                response = respond(asked, reply, Writing(request.state.request_id, clock, is_over))
                return response.model_dump_json(exclude_unset=True)  # without what was not asked for

            if is_quick(asked, reply):
                text = to_json(lambda: False)
            else:
                threads = self._mask_threads if is_costly(asked) else None
                text = await self._in_thread(request, threads, to_json, deadline_s + GRACE_S)
            return self._answer(text, *([] if advice is None else [advice]))

    async def images(self, request: Request) -> Response:
        limits = self._limits
        clock = StageClock(request.state.started_s)
        async with self._admitted(request) as (incoming, deadline_s):
            received = await read_request(incoming, limits.max_body_bytes)
            clock.lap("body")
            image = await asyncio.to_thread(check_upload, received, limits)
            clock.lap("check")
            reply = _value(await _while_connected(request, self._backend.keep_image(image, _left(deadline_s))))
            clock.lap("segmenter")
        height, width = reply.size_hw
        response = ImageResponse(
            request_id=request.state.request_id,
            image_id=IMAGE_ID_PREFIX + reply.key,
            width=width,
            height=height,
            timing_ms=clock.with_total({}),
        )
        return _json(response.model_dump_json())

    async def adapters(self, request: Request) -> Response:
        asked = check_listing(request.query_params.multi_items())
        page = _value(await self._backend.list_adapters(asked))
        text = adapters_json(page, request.state.request_id)
        return self._answer(text, "ask with a limit")

    def _answer(self, text: str, *advice: str) -> Response:
        """The text as JSON; `advice` is what to do where it is too large."""
        if len(text) > self._limits.max_answer_bytes:
            raise answer_too_large(len(text), self._limits.max_answer_bytes, *advice)
        return _json(text)

    async def healthz(self) -> Response:
        return _json(StatusResponse(status="ok").model_dump_json())

    async def drain(self, timeout_s: float) -> None:
        self._closing = True
        give_up_at = time.monotonic() + timeout_s
        while self._admission.num_requests and time.monotonic() < give_up_at:
            await asyncio.sleep(0.02)

    async def readyz(self) -> Response:
        self._check_open()
        if not await self._backend.ready():
            raise ServeError("not_ready", "no replica is ready yet: try again in a few seconds", 2.0)
        return _json(StatusResponse(status="ready").model_dump_json())

    async def metrics(self) -> Response:
        texts = {self._name: self._metrics.text(), **await self._backend.metrics()}
        return Response(await asyncio.to_thread(merge, texts), media_type=CONTENT_TYPE)

    async def _in_thread(
        self,
        request: Request,
        threads: ThreadPoolExecutor | None,
        work: Callable[[Callable[[], bool]], str],
        deadline_s: float,
    ) -> str:
        """Run `work` in a thread. It gets a function that says whether the client left or the time is over."""
        gone = threading.Event()
        run = partial(work, lambda: gone.is_set() or time.monotonic() > deadline_s)
        try:
            return await _while_connected(request, asyncio.get_running_loop().run_in_executor(threads, run))
        finally:
            gone.set()

    def _check_open(self) -> None:
        if self._closing:
            raise ServeError("not_ready", "the service is stopping: try again in a few seconds", 2.0)

    @contextlib.asynccontextmanager
    async def _admitted(self, request: Request) -> AsyncIterator[tuple[Request, float]]:
        """Limit how many requests are in progress, and for how long. Yields the one to read from, and its deadline."""
        self._check_open()
        deadline_s = request.state.started_s + self._limits.timeout_s
        try:
            async with asyncio.timeout(_left(deadline_s) + GRACE_S), self._admission.admit(request) as incoming:
                yield incoming, deadline_s
        except TimeoutError:
            message = f"no answer within {self._limits.timeout_s:g} s: try again later, or with fewer prompts"
            raise ServeError("timeout", message) from None


async def _while_connected(request: Request, answer: Awaitable[T]) -> T:
    """Await an answer; cancel it and raise ClientDisconnect when the client disconnects."""
    working, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
            task.add_done_callback(_retrieve)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Or asyncio would log an exception that nobody waited for, with its message."""
    task.cancelled() or task.exception()


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


STATIC = Path(__file__).parent.parent / "static"
PAGES = {"/": "index.html", "/labels": "labels.html", "/docs": "docs.html"}
_CHECK_ALWAYS = {"Cache-Control": "no-cache"}  # browsers ask each time, and get 304 for an unchanged file


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_CHECK_ALWAYS)
        return response


def add_pages(api: FastAPI) -> None:
    """`PAGES` and `/static/*`."""

    def show(name: str) -> Callable[[], Awaitable[Response]]:
        async def page() -> Response:
            return _page(name)

        return page

    for path, name in PAGES.items():
        api.add_api_route(path, show(name), include_in_schema=False)
    api.mount("/static", _Files(directory=STATIC, check_dir=False))


def _page(name: str) -> Response:
    path = STATIC / name
    if not path.is_file():
        raise HTTPException(404)
    return FileResponse(path, media_type="text/html", headers=_CHECK_ALWAYS)
