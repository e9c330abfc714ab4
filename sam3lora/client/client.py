"""The two clients, blocking and asynchronous, with the same calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar, Unpack

import httpx2 as httpx

from sam3lora.client import calls
from sam3lora.client.calls import DenseOptions, RefineOptions, SegmentOptions, ShownObject
from sam3lora.client.clicking import ClickSession
from sam3lora.client.dense_results import DenseLabels
from sam3lora.client.errors import ConnectionFailed, Timeout
from sam3lora.client.exchange import Attempt, Budget, Outcome, Reply, Service, Steps, Wait
from sam3lora.client.image_files import ImageSource, UploadedImage, image_bytes
from sam3lora.client.refine_results import RefinedObject, RefineResults
from sam3lora.client.segment_results import AdapterInfo, SegmentResults

T = TypeVar("T")
READY_TIMEOUT_S = 5.0


class _CallSettings:
    """Arguments that both clients share."""

    def __init__(
        self, url: str, api_key: str | None, timeout_s: float, max_retries: int | None, clock: Callable[[], float]
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        if timeout_s <= 0 or (max_retries is not None and max_retries < 0):
            raise ValueError(f"timeout_s must be positive and max_retries not negative, got {timeout_s}, {max_retries}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key has characters that a header cannot hold: does it end with a line break?")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.clock = clock
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._service = Service()

    def budget(self) -> Budget:
        return Budget(self._timeout_s, self._max_retries, self.clock, self._service)

    def single_attempt(self) -> Budget:
        return Budget(min(READY_TIMEOUT_S, self._timeout_s), 0, self.clock, self._service)

    def read_limit(self, attempt: Attempt) -> Callable[[], None]:
        """A function to call at each piece of a response: the timeout of httpx holds between two pieces only."""
        deadline = self.clock() + attempt.timeout_s

        def check() -> None:
            if self.clock() > deadline:
                raise httpx.ReadTimeout("the response takes too long")

        return check


def _arguments(attempt: Attempt) -> dict[str, Any]:
    call = attempt.call
    timeout = httpx.Timeout(attempt.timeout_s)
    return {"method": call.method, "url": call.path, "headers": attempt.headers, "timeout": timeout, **call.body}


class Client:
    """Client of a running service; threads may share it.

        with Client("http://127.0.0.1:8000") as client:
            results = client.segment("photo.jpg", ["crack"], adapter="cracks")

    Args:
        url: Address of the service, with its path prefix, if any.
        api_key: Sent with every call.
        timeout_s: Limit of a call with all its retries.
        max_retries: Retries after 502, 503, 429 and broken connections; None for as many as the time allows, or three
            while nothing ever responded at the URL.
        transport: Sends the requests, for example `httpx2.MockTransport`.

    Raises:
        ValueError: The URL is invalid, a number is out of range, or the key cannot be sent.

    Every method raises a subclass of `SegmentationError` if the call fails.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = _CallSettings(url, api_key, timeout_s, max_retries, clock)
        self._sleep = sleep
        self._http = httpx.Client(base_url=url, headers=self._settings.headers, transport=transport)

    def segment(
        self,
        image: ImageSource | UploadedImage,
        prompts: str | Iterable[str] = (),
        **options: Unpack[SegmentOptions],
    ) -> SegmentResults:
        """Segment what prompts name or boxes show.

        Args:
            image: A path, the bytes of an image file, a PIL image, uint8 (H, W, 3) RGB, or what `upload` returned;
                an uploaded image that the service has evicted is sent again.
            prompts: Short noun phrases.
            **options: See `SegmentOptions`.

        Raises:
            OSError: The image's file cannot be read.
            TypeError: `image` has another type, or an option is unknown.
            ValueError: The array or a box has the wrong form.
        """
        source = image if isinstance(image, UploadedImage) else image_bytes(image)
        return self._run(calls.segment(source, prompts, options, self._settings.budget()))

    def dense(self, image: ImageSource | UploadedImage, adapter: str, **options: Unpack[DenseOptions]) -> DenseLabels:
        """Label each pixel, by an adapter of task dense.

        Args:
            image: As for `segment`.
            adapter: Id of the adapter.
            **options: See `DenseOptions`.

        Raises:
            OSError: The image's file cannot be read.
            TypeError: `image` has another type, or an option is unknown.
        """
        source = image if isinstance(image, UploadedImage) else image_bytes(image)
        return self._run(calls.dense(source, adapter, options, self._settings.budget()))

    def refine(
        self,
        image: ImageSource | UploadedImage,
        objects: ShownObject | Iterable[ShownObject],
        **options: Unpack[RefineOptions],
    ) -> RefineResults:
        """Outline what clicks and boxes show, or correct a mask by clicks.

        Args:
            image: As for `segment`; upload it first for several calls.
            objects: One or several: see `ShownObject`.
            **options: See `RefineOptions`.

        Raises:
            OSError: The image's file cannot be read.
            TypeError: `image` has another type, or an option or a part of an object is unknown.
            ValueError: A click has the wrong form.
        """
        source = image if isinstance(image, UploadedImage) else image_bytes(image)
        return self._run(calls.refine(source, calls.listed(objects), options, self._settings.budget()))

    def interact(self, image: ImageSource | UploadedImage, **options: Unpack[RefineOptions]) -> ClickSession:
        """Click on an image, one call after the other: see `ClickSession`. Arguments as of `refine`."""
        uploaded = image if isinstance(image, UploadedImage) else self.upload(image)

        def ask(asked: ShownObject) -> RefinedObject:
            return self.refine(uploaded, asked, **options)[0]

        return ClickSession(uploaded, ask)

    def upload(self, image: ImageSource) -> UploadedImage:
        """Upload an image for several calls about it; `image` as for `segment`."""
        return self._run(calls.upload(image_bytes(image), self._settings.budget()))

    def adapters(self, search: str | None = None, limit: int | None = None) -> list[AdapterInfo]:
        """The adapters of the service by id: those with `search` in their id, a prompt or a class, and at most `limit`.

        Raises:
            ValueError: `limit` is below 1.
        """
        return self._run(calls.adapters(search, limit, self._settings.budget()))

    def answers_clicks(self) -> bool:
        """Whether the service's base model has a click head, which `refine` needs."""
        return self._run(calls.answers_clicks(self._settings.budget()))

    def ready(self) -> bool:
        """Whether the service is ready now: one attempt of at most 5 s."""
        try:
            return self._run(calls.ready(self._settings.single_attempt()))
        except (ConnectionFailed, Timeout):
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Wait):
                self._sleep(step.seconds)
                outcome = None
            else:
                outcome = self._send(step)

    def _send(self, attempt: Attempt) -> Outcome:
        check_time = self._settings.read_limit(attempt)
        try:
            with self._http.stream(**_arguments(attempt)) as response:
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    check_time()
        except httpx.RequestError as error:
            return error
        return Reply(response.status_code, response.headers, bytes(content))


class AsyncClient:
    """`Client` for an event loop: the same arguments, methods and errors, to be awaited.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            results = await client.segment("photo.jpg", ["crack"])

    An instance belongs to the event loop that first uses it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = _CallSettings(url, api_key, timeout_s, max_retries, clock)
        self._sleep = sleep
        self._http = httpx.AsyncClient(base_url=url, headers=self._settings.headers, transport=transport)

    async def segment(
        self,
        image: ImageSource | UploadedImage,
        prompts: str | Iterable[str] = (),
        **options: Unpack[SegmentOptions],
    ) -> SegmentResults:
        source = image if isinstance(image, UploadedImage) else await asyncio.to_thread(image_bytes, image)
        return await self._run(calls.segment(source, prompts, options, self._settings.budget()))

    async def dense(
        self, image: ImageSource | UploadedImage, adapter: str, **options: Unpack[DenseOptions]
    ) -> DenseLabels:
        source = image if isinstance(image, UploadedImage) else await asyncio.to_thread(image_bytes, image)
        return await self._run(calls.dense(source, adapter, options, self._settings.budget()))

    async def refine(
        self,
        image: ImageSource | UploadedImage,
        objects: ShownObject | Iterable[ShownObject],
        **options: Unpack[RefineOptions],
    ) -> RefineResults:
        source = image if isinstance(image, UploadedImage) else await asyncio.to_thread(image_bytes, image)
        return await self._run(calls.refine(source, calls.listed(objects), options, self._settings.budget()))

    async def upload(self, image: ImageSource) -> UploadedImage:
        data = await asyncio.to_thread(image_bytes, image)
        return await self._run(calls.upload(data, self._settings.budget()))

    async def adapters(self, search: str | None = None, limit: int | None = None) -> list[AdapterInfo]:
        return await self._run(calls.adapters(search, limit, self._settings.budget()))

    async def answers_clicks(self) -> bool:
        return await self._run(calls.answers_clicks(self._settings.budget()))

    async def ready(self) -> bool:
        try:
            return await self._run(calls.ready(self._settings.single_attempt()))
        except (ConnectionFailed, Timeout):
            return False

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Wait):
                await self._sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._send(step)

    async def _send(self, attempt: Attempt) -> Outcome:
        check_time = self._settings.read_limit(attempt)
        try:
            async with self._http.stream(**_arguments(attempt)) as response:
                content = bytearray()
                async for piece in response.aiter_bytes():
                    content += piece
                    check_time()
        except httpx.RequestError as error:
            return error
        return Reply(response.status_code, response.headers, bytes(content))
