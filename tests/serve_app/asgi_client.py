"""ASGI requests whose parts a test sends and sees one by one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from .http_cases import PNG

IMAGE = {"content-type": "image/png"}
QUESTION = "prompts=crack"


class Client:
    """One ASGI request whose parts a test sends and sees one by one."""

    def __init__(
        self, api: Any, path: str, headers: dict[str, str], method: str = "POST", query: str = QUESTION
    ) -> None:
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        self.task = asyncio.ensure_future(api(scope, self.incoming.get, self.send))

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def body(self, data: bytes, *, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def answer(self) -> tuple[int, dict[str, Any]]:
        await asyncio.wait_for(self.task, 20)
        return self.sent[0]["status"], json.loads(self.sent[1]["body"])


def sent(api: Any, query: str = QUESTION) -> Client:
    """A request whose whole body is sent."""
    client = Client(api, "/v1/segment", IMAGE, query=query)
    client.body(PNG)
    return client


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)
