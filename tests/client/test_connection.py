"""The clients over real connections, and what importing them costs."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from sam3lora.client import AsyncClient, Client, ConnectionFailed, NotFound

from ..serve_app.page_server import serving
from .scripted import rle


def contract_app() -> FastAPI:
    """Speaks the contract, overloaded at first; an image is "found" by its own brightness."""
    app = FastAPI()
    app.state.segment_calls = 0

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/segment")
    async def segment(request: Request) -> JSONResponse:
        form = await request.form()
        image = Image.open(io.BytesIO(await form["image"].read()))
        asked = json.loads(form["request"])
        app.state.segment_calls += 1
        if app.state.segment_calls == 1:
            error = {"type": "overloaded", "message": "full", "request_id": request.headers["x-request-id"]}
            return JSONResponse({"error": error}, 503, {"Retry-After": "0"})
        bright_HW = np.asarray(image.convert("L")) > 128
        found = {"score": 1.0, "box_xyxy": [0, 0, 1, 1], "area_px": int(bright_HW.sum()), "mask": rle(bright_HW)}
        result = {"prompt": asked["prompts"][0], "presence": 1.0, "num_detections": 1, "detections": [found]}
        height, width = bright_HW.shape
        body = {"request_id": request.headers["x-request-id"], "image": {"width": width, "height": height}}
        return JSONResponse({**body, "adapter": None, "results": [result], "timing_ms": {"total": 1.0}})

    return app


@pytest.fixture
def server_url() -> Iterator[str]:
    with serving(contract_app()) as url:
        yield url


def test_over_a_real_connection(server_url):
    pixels_HW3 = np.zeros((20, 30, 3), np.uint8)
    pixels_HW3[5:9, 10:20] = 255

    with Client(server_url) as client:
        assert client.ready()
        results = client.segment(pixels_HW3, ["white thing"])
        np.testing.assert_array_equal(results[0].masks[0], pixels_HW3[..., 0] > 0)
        with pytest.raises(NotFound) as caught:
            client.adapters()
        assert caught.value.type == "http_404"

    async def ask_at_once() -> list[int]:
        async with AsyncClient(server_url) as client:
            answers = await asyncio.gather(*(client.segment(pixels_HW3, ["white thing"]) for _ in range(5)))
        return [int(answer[0].areas_px[0]) for answer in answers]

    assert asyncio.run(ask_at_once()) == [40] * 5


def test_a_closed_port():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # reserved, but nobody listens
        port = closed.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", max_retries=0) as client:
        assert client.ready() is False
        with pytest.raises(ConnectionFailed):
            client.adapters()


def test_imports_stay_light():
    code = "import sys, sam3lora.client; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "httpx2" in loaded
    assert not {"torch", "ray", "transformers", "cv2", "pyarrow", "pandas", "scipy"} & set(loaded)
