"""API keys of the service."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence

from starlette.datastructures import Headers

from sam3lora.errors import UserError

OPEN_PATHS = frozenset(("/", "/labels", "/docs", "/openapi.json", "/healthz", "/readyz"))
OPEN_PREFIX = "/static/"


def keys_from_environment(variable: str) -> tuple[bytes, ...]:
    """The keys in an environment variable, separated by commas; none if it is unset or empty.

    Raises:
        UserError: It is set but holds no key: the service would be open by mistake.
    """
    text = os.environ.get(variable, "")
    keys = tuple(key.strip().encode() for key in text.split(",") if key.strip())
    if text and not keys:
        raise UserError(f"{variable} holds no key: expected keys separated by commas; unset it to serve without keys")
    return keys


def is_open(route_path: str) -> bool:
    """Whether a path, without the prefix under which the service is mounted, needs no key."""
    return route_path in OPEN_PATHS or route_path.startswith(OPEN_PREFIX)


def is_allowed(headers: Headers, keys: Sequence[bytes]) -> bool:
    """Whether `Authorization: Bearer KEY` or `X-API-Key: KEY` holds one of the keys, or there are none.

    Runs in constant time.
    """
    if not keys:
        return True
    scheme, _, token = headers.get("authorization", "").partition(" ")
    offered = [token.strip()] if scheme.lower() == "bearer" else []
    offered.append(headers.get("x-api-key", "").strip())
    # Headers are latin-1 text in Starlette.
    matches = [hmac.compare_digest(value.encode("latin-1"), key) for value in offered for key in keys]
    return any(matches)
