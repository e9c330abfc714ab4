"""The web page, the documentation page of the API, and their static files."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent.parent / "static"
_CHECK_ALWAYS = {"Cache-Control": "no-cache"}  # browsers ask each time, and get 304 for an unchanged file


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_CHECK_ALWAYS)
        return response


def add_pages(api: FastAPI) -> None:
    """`/`, `/docs` and `/static/*`."""

    async def index() -> Response:
        return _page("index.html")

    async def docs() -> Response:
        return _page("docs.html")

    api.add_api_route("/", index, include_in_schema=False)
    api.add_api_route("/docs", docs, include_in_schema=False)
    api.mount("/static", _Files(directory=STATIC, check_dir=False))


def _page(name: str) -> Response:
    path = STATIC / name
    if not path.is_file():
        raise HTTPException(404)
    return FileResponse(path, media_type="text/html", headers=_CHECK_ALWAYS)
