"""Decoding of the images of requests in threads; equal images that are asked for at the same time are decoded once."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from sam3lora.engine.engine import Engine
from sam3lora.engine.feature_cache import PreparedImage
from serve_app.http.errors import ServeError, refuse_as
from serve_app.messages import ImageFile
from serve_app.replica.shared_calls import SharedCalls


class ImageDecoder:
    """Brings images to the size of the model's input. Belongs to one event loop."""

    def __init__(self, engine: Engine, threads: int, *, max_megapixels: float) -> None:
        self._engine = engine
        self._max_megapixels = max_megapixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._calls: SharedCalls[PreparedImage] = SharedCalls(self._pool)
        self._prepared: WeakValueDictionary[str, PreparedImage] = WeakValueDictionary()  # of requests in progress

    async def image(self, file: ImageFile, deadline: float) -> PreparedImage:
        """The decoded image, which the engine's cache or another request may have.

        Raises:
            ServeError: It cannot be read, is too large, is no longer kept, or the time is up; the deadline is by
                `time.monotonic`.
        """
        known = self._engine.cached_image(file.key) or self._prepared.get(file.key)
        if known is not None:
            return known
        data = file.data
        if data is None:
            raise ServeError("image_not_found", "this image is not in the cache: upload it again with POST /v1/images")
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as limit:
                image = await self._calls.run(file.key, lambda: self._decode(data, file.key))
        except TimeoutError:
            if not limit.expired():
                raise
            raise ServeError("timeout", "the image was not decoded in time: try again", 1.0) from None
        return self._prepared.setdefault(file.key, image)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, data: bytes, key: str) -> PreparedImage:
        with refuse_as("invalid_image"):
            return self._engine.prepare_image(data, key, max_megapixels=self._max_megapixels)
