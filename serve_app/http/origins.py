"""Pages in browsers: the names under which the service may be called, and the other sites that may call it (CORS)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import Response

from serve_app.http.errors import ServeError

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+))(?::\d*)?")
PROBES = frozenset(("/healthz", "/readyz"))  # asked under the address of a container

_FOR_ALL = {"Access-Control-Expose-Headers": "X-Request-ID, Retry-After"}
_FOR_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    "Access-Control-Allow-Headers": "Authorization, X-API-Key, Content-Type, X-Request-ID",
    "Access-Control-Max-Age": "600",
}


def check_host(headers: Headers, allowed: Sequence[str] | None) -> None:
    """Refuse a request to a name that is not the service's own, without its port; None allows any.

    A page elsewhere can have its own name lead to this machine (DNS rebinding), and would be as trusted as our page.
    """
    hosts = headers.getlist("host")
    if len(hosts) > 1:
        raise ServeError("malformed_request", "expected one header Host")
    if allowed is not None and _without_port("".join(hosts)) not in {name.lower() for name in allowed}:
        names = ", ".join(allowed)
        message = f"this service answers as {names}: add the name that you call to allowed_hosts in its settings"
        raise ServeError("unknown_host", message)


def cors_headers(headers: Headers, origins: Sequence[str]) -> dict[str, str]:
    """Headers of every response to a page of an allowed origin; keys come in headers, so no cookies are involved."""
    origin = headers.get("origin", "")
    if "*" in origins:
        return {"Access-Control-Allow-Origin": "*", **_FOR_ALL}
    allowed = {"Access-Control-Allow-Origin": origin, **_FOR_ALL} if origin in origins else {}
    return {"Vary": "Origin", **allowed} if origins else {}


def preflight(method: str, headers: Headers, origins: Sequence[str]) -> Response | None:
    """The answer to a browser that asks, without the key, whether a page may send its request; None for others."""
    is_asking = method == "OPTIONS" and "access-control-request-method" in headers
    if is_asking and "Access-Control-Allow-Origin" in cors_headers(headers, origins):
        return Response(status_code=204, headers=_FOR_PREFLIGHT)
    return None


def _without_port(host: str) -> str | None:
    """`[::1]:8000` -> `::1`; None for what is no host."""
    found = _HOST.fullmatch(host.lower())
    return found and (found[1] or found[2].removesuffix("."))
