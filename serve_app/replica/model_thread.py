"""A thread that uses the model, and the error after which the device is unusable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sam3lora.engine.device import is_device_error

logger = logging.getLogger(__name__)


class ModelThread:
    """Runs one function at a time, and keeps the error that made the device unusable for this process."""

    def __init__(self, name: str = "model") -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._busy_since: float | None = None
        self.device_error: Exception | None = None

    @property
    def busy_s(self) -> float:
        """Seconds that the current work has taken; 0 when the thread is idle."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    async def run(self, fn: Callable[[], Any]) -> Any:
        self._busy_since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, fn)
        except Exception as error:
            self.note(error)
            raise
        finally:
            self._busy_since = None

    def run_at_start(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` and block until it is done."""
        return self._thread.submit(fn).result()

    def note(self, error: Exception) -> None:
        """Report an error that `run` does not see. From any thread."""
        if self.device_error is None and is_device_error(error):
            logger.error("the device failed with %s: %s", type(error).__name__, error)
            self.device_error = error

    def stop(self) -> None:
        """Let the thread end after its current work."""
        self._thread.shutdown(wait=False)
