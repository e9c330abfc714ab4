"""The two clients: the same calls, sent by a thread or by an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar, Unpack

import httpx2 as httpx

from sam3lora.client import calls
from sam3lora.client.calls import SegmentOptions
from sam3lora.client.errors import ConnectionFailed, Timeout
from sam3lora.client.exchange import Attempt, Budget, Outcome, Reply, Steps, Wait
from sam3lora.client.image_files import ImageSource, UploadedImage, image_bytes
from sam3lora.client.segment_results import AdapterInfo, SegmentResults

T = TypeVar("T")
READY_TIMEOUT_S = 5.0


class _Settings:
    """What both clients are made of, but for the connection."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float, max_retries: int, clock: Callable[[], float]):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        if timeout_s <= 0 or max_retries < 0:
            raise ValueError(f"timeout_s must be positive and max_retries not negative, got {timeout_s}, {max_retries}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key holds characters that a header cannot: was a line break read with it?")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.clock = clock
        self._timeout_s = timeout_s
        self._max_retries = max_retries

    def budget(self) -> Budget:
        return Budget(self._timeout_s, self._max_retries, self.clock)

    def single_attempt(self) -> Budget:
        return Budget(min(READY_TIMEOUT_S, self._timeout_s), 0, self.clock)

    def read_limit(self, attempt: Attempt) -> Callable[[], None]:
        """To be called at each piece of an answer: the timeout of httpx is one between two pieces."""
        deadline = self.clock() + attempt.timeout_s

        def check() -> None:
            if self.clock() > deadline:
                raise httpx.ReadTimeout("the answer takes too long")

        return check


def _arguments(attempt: Attempt) -> dict[str, Any]:
    call = attempt.call
    timeout = httpx.Timeout(attempt.timeout_s)
    return {"method": call.method, "url": call.path, "headers": attempt.headers, "timeout": timeout, **call.body}


class Client:
    """A running service; may be shared by threads.

        with Client("http://127.0.0.1:8000") as client:
            results = client.segment("photo.jpg", ["crack"], adapter="cracks")

    Args:
        url: Where the service is, with the path that it is served under, if any.
        api_key: Sent with every call.
        timeout_s: For a call with all its repetitions.
        max_retries: Repetitions after 503, 429 and broken connections.
        transport: Another way to send requests, such as `httpx2.MockTransport`.
        sleep: Waits that many seconds.
        clock: Seconds, from anywhere.

    Raises:
        ValueError: The URL is none, a number is out of range, or the key cannot be sent.

    Every method raises a subclass of `SegmentationError` if it gets no answer.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 3,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = _Settings(url, api_key, timeout_s, max_retries, clock)
        self._sleep = sleep
        self._http = httpx.Client(base_url=url, headers=self._settings.headers, transport=transport)

    def segment(
        self,
        image: ImageSource | UploadedImage,
        prompts: str | Iterable[str] = (),
        **options: Unpack[SegmentOptions],
    ) -> SegmentResults:
        """Find what prompts name, or what boxes show.

        Args:
            image: A path, the bytes of an image file, a PIL image, uint8 (H, W, 3) RGB, or what `upload` returned;
                an uploaded image that the service no longer keeps is sent again.
            prompts: Short noun phrases.
            **options: `boxes`, `adapter`, `threshold`, `nms_iou`, `merge`, `merge_iou`, `max_detections`, `masks`:
                see `SegmentOptions`.

        Raises:
            OSError: The image's file cannot be read.
            TypeError: `image` is none of these, or there is no such option.
            ValueError: The array or a box has another form.
        """
        source = image if isinstance(image, UploadedImage) else image_bytes(image)
        return self._run(calls.segment(source, prompts, options, self._settings.budget()))

    def upload(self, image: ImageSource) -> UploadedImage:
        """Have the service keep an image, for several questions about it; `image` as for `segment`."""
        return self._run(calls.upload(image_bytes(image), self._settings.budget()))

    def adapters(self) -> list[AdapterInfo]:
        """The adapters that the service knows."""
        return self._run(calls.adapters(self._settings.budget()))

    def ready(self) -> bool:
        """Whether the service answers calls at this moment: one attempt of at most 5 s."""
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

    It belongs to the event loop that it is first used in.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = _Settings(url, api_key, timeout_s, max_retries, clock)
        self._sleep = sleep
        self._http = httpx.AsyncClient(base_url=url, headers=self._settings.headers, transport=transport)

    async def segment(
        self,
        image: ImageSource | UploadedImage,
        prompts: str | Iterable[str] = (),
        **options: Unpack[SegmentOptions],
    ) -> SegmentResults:
        """See `Client.segment`."""
        source = image if isinstance(image, UploadedImage) else await asyncio.to_thread(image_bytes, image)
        return await self._run(calls.segment(source, prompts, options, self._settings.budget()))

    async def upload(self, image: ImageSource) -> UploadedImage:
        """See `Client.upload`."""
        data = await asyncio.to_thread(image_bytes, image)
        return await self._run(calls.upload(data, self._settings.budget()))

    async def adapters(self) -> list[AdapterInfo]:
        """See `Client.adapters`."""
        return await self._run(calls.adapters(self._settings.budget()))

    async def ready(self) -> bool:
        """See `Client.ready`."""
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
