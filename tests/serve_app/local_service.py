"""The whole service in one process, without Ray: the HTTP application in front of one model replica."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from serve_app.http.errors import ServeError
from serve_app.http.ingress import create_api
from serve_app.messages import (
    EVERY_ADAPTER,
    AdapterPage,
    AdapterQuery,
    DenseCall,
    DenseReply,
    ImageFile,
    ImageReply,
    RefineCall,
    RefineReply,
    SegmentCall,
    SegmentReply,
)
from serve_app.replica.replica import ModelReplica
from serve_app.settings import ServeSettings


class LocalBackend:
    """A `Backend` of one replica on the same event loop."""

    def __init__(self, replica: ModelReplica) -> None:
        self.replica = replica

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        return await self.replica.segment(call)

    async def label(self, call: DenseCall) -> DenseReply | ServeError:
        return await self.replica.label(call)

    async def refine(self, call: RefineCall) -> RefineReply | ServeError:
        return await self.replica.refine(call)

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError:
        return await self.replica.keep_image(image, timeout_s)

    async def list_adapters(self, query: AdapterQuery = EVERY_ADAPTER) -> AdapterPage | ServeError:
        return await self.replica.list_adapters(query)

    async def metrics(self) -> dict[str, str]:
        return dict([await self.replica.named_metrics()])

    async def ready(self) -> bool:
        return await self.replica.ready()


def local_service(settings: ServeSettings, **replica: Any) -> ASGIApp:
    return create_api(settings, LocalBackend(ModelReplica(settings, **replica)))


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The URL of the application on a port of 127.0.0.1."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
