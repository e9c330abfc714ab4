"""The service's port, where the application's HTTP process listens itself: see `serve_app.settings.DIRECT`.

There is one such port. Ray binds it without SO_REUSEADDR, and gives it up for good after one failure.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sam3lora.errors import UserError
from sam3lora.local_ray import replaced

WAIT_S = 15.0
"""How long a port may be taken: by a process that is about to end."""

_AGAIN_S = 0.2
_Start = Callable[..., Awaitable[Any]]


def listen_on(host: str) -> None:
    """Have this process, a replica of Ray Serve, listen on `host` wherever Ray's own HTTP process listens."""
    from ray.serve._private import replica

    patched: Any = replica
    patched.start_asgi_http_server = patient_start(replica.start_asgi_http_server, host)


def patient_start(start: _Start, host: str, *, wait_s: float = WAIT_S) -> _Start:
    """Ray's `start_asgi_http_server`, on `host` and for a port that may be taken at first.

    Connections of a process that died do not block its port (SO_REUSEADDR). SO_REUSEPORT, as Ray has it elsewhere,
    would let two services share a port.

    Raises:
        UserError: By what is returned: the port stays taken, or cannot be listened on at all.
    """

    async def start_patiently(app: Any, http_options: Any, **options: Any) -> Any:
        from ray.serve._private import http_util

        http_options = http_options.model_copy(update={"host": host})
        give_up_s = time.monotonic() + wait_s
        while True:
            try:
                with replaced(http_util, "set_socket_reuse_port", _reuse_address):  # it binds before it awaits
                    return await start(app, http_options, **options | {"enable_so_reuseport": True})
            except RuntimeError as error:
                reason = error.__cause__
                if not isinstance(reason, OSError):
                    raise
                if reason.errno != errno.EADDRINUSE or time.monotonic() >= give_up_s:
                    # Not a RuntimeError: Ray would give up the port.
                    raise cannot_listen(host, http_options.port, reason) from None
            await asyncio.sleep(_AGAIN_S)

    return start_patiently


def cannot_listen(host: str, port: int, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
    return UserError(f"cannot listen on {host}:{port}: {reason}. Choose another --port")


def _reuse_address(listener: socket.socket) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
