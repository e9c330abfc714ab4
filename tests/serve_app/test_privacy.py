"""Prompts are in no error, log or metric, whatever goes wrong."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from sam3lora.engine.engine import Engine
from sam3lora.engine.selection import SmallDetections
from sam3lora.model.loading import load_base
from serve_app.settings import ServeSettings

from .http_cases import PNG, PNG_BASE64, as_json, multipart, picture, raw
from .local_service import local_service

SECRET = "zebra fish"
LONG = " ".join([SECRET] * 9)  # the small model has a token for each letter


@pytest.fixture(scope="module")
def engine(spread_base: Path) -> Engine:
    return Engine(load_base(str(spread_base)))


@pytest.fixture
def client(spread_base: Path, engine: Engine, caplog: pytest.LogCaptureFixture) -> Iterator[TestClient]:
    caplog.set_level(logging.WARNING, logger="httpx2")  # the test's own client logs addresses
    settings = ServeSettings(model=str(spread_base), api_keys_variable="SAM3LORA_TEST_KEYS")
    with TestClient(local_service(settings, engine=engine), raise_server_exceptions=False) as client:
        yield client


def body(text: str | bytes, kind: str = "application/json") -> dict[str, Any]:
    return {"content": text, "headers": {"content-type": kind}}


def part(head: str, content: str, end: str = "--b--\r\n") -> dict[str, Any]:
    text = f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{content}\r\n{end}"
    return body(text, "multipart/form-data; boundary=b")


def picture_with_text() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF", comment=SECRET.encode())
    return file.getvalue()


REFUSED: dict[str, dict[str, Any]] = {
    "too many tokens": as_json(prompts=["fine", LONG]),
    "too many tokens in a form": multipart({"prompts": [LONG]}),
    "too many tokens in a query": raw(f"prompts={LONG}"),
    "too many characters": as_json(prompts=[LONG * 10]),
    "too many prompts": as_json(prompts=[SECRET] * 40),
    "control character": as_json(prompts=[SECRET + "\x07"]),
    "half a character": body(json.dumps({"prompts": [SECRET + "\ud800"], "image_base64": PNG_BASE64})),
    "no list": as_json(prompts=SECRET),
    "an object": as_json(prompts=[{SECRET: 1}]),
    "as a name": as_json(**{SECRET: 1}),
    "as a name of a box": as_json(boxes=[{"xyxy": [1, 2, 3, 4], SECRET: 1}]),
    "as a repeated name": body(f'{{"{SECRET}": 1, "{SECRET}": 2}}'),
    "as another field": as_json(masks=SECRET),
    "as a number": as_json(threshold=SECRET),
    "as an adapter": as_json(adapter=SECRET),
    "as an image id": {"json": {"prompts": [SECRET], "image_id": SECRET}},
    "as base64": as_json(image_base64=SECRET),
    "as a data address": as_json(image_base64=f"data:{SECRET},x"),
    "in broken JSON": body(f'{{"prompts": ["{SECRET}", \\{SECRET}'),
    "in JSON of another code": body(json.dumps({"prompts": [SECRET]}).encode("utf-16")),
    "as a query number": raw(f"prompts=a&threshold={SECRET}"),
    "as a repeated query name": raw(f"prompts=a&{SECRET}=1&{SECRET}=2"),
    "as a query box": raw(f"prompts=a&boxes={SECRET}"),
    "in the query of a form": multipart({"prompts": ["a"]}) | {"params": {"prompts": SECRET}},
    "as a part": part(f'name="{SECRET}"', "x"),
    "in a broken part": part(f'name="{SECRET}', SECRET, end=""),
    "in a part without a name": part(f'filename="{SECRET}"', SECRET),
    "as a content type": body(SECRET, SECRET),
    "with a damaged image": multipart({"prompts": [SECRET]}, PNG[:-400]),
    "as an image": multipart({"prompts": [SECRET]}, SECRET.encode()),
    "in a damaged image": multipart({"prompts": ["a"]}, picture_with_text()[:-20]),
    "with a box outside": as_json(prompts=[SECRET], boxes=[{"xyxy": [0, 0, 900, 900]}]),
    "with an unknown adapter": as_json(prompts=[SECRET], adapter="nowhere"),
    "with settings that exclude each other": as_json(prompts=[SECRET], nms="none", nms_iou=0.3),
}


@pytest.mark.parametrize("sent", [pytest.param(sent, id=name) for name, sent in REFUSED.items()])
def test_refusals(client: TestClient, caplog: pytest.LogCaptureFixture, sent: dict[str, Any]):
    with caplog.at_level(logging.DEBUG):
        response = client.post("/v1/segment", **sent)
    assert 400 <= response.status_code < 500, response.text
    assert_hidden(response.text, caplog.text, client.get("/metrics").text)


def test_a_prompt_that_is_too_long_is_named_by_its_number(client: TestClient):
    error = client.post("/v1/segment", **REFUSED["too many tokens"]).json()["error"]
    assert (error["type"], error["field"]) == ("invalid_prompt", "prompts[1]")
    assert re.match(r"prompts\[1\] has \d+ tokens", error["message"])


def raising(make: Callable[[str], Exception]) -> Callable[..., Any]:
    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise make(f"cannot read {SECRET}")

    return fail


FAULTS: dict[str, tuple[type, str, Callable[[str], Exception]]] = {
    "a bug before the queue": (Engine, "prepare_image", KeyError),
    "a bug in a batch": (Engine, "detect_small", KeyError),
    "a mistake that nobody foresaw": (Engine, "detect_small", ValueError),
    "a bug in the masks": (SmallDetections, "at_full_size", KeyError),
    "no memory": (Engine, "detect_small", lambda text: torch.OutOfMemoryError("CUDA out of memory")),
}


@pytest.mark.parametrize(("where", "name", "make"), FAULTS.values(), ids=FAULTS)
def test_faults(
    client: TestClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: type,
    name: str,
    make: Callable[[str], Exception],
):
    monkeypatch.setattr(where, name, raising(make))
    sent = as_json(prompts=[SECRET], image_base64=base64.b64encode(picture(seed=sum(map(ord, name)))).decode())
    with caplog.at_level(logging.DEBUG):
        response = client.post("/v1/segment", **sent)
    assert response.status_code >= 500
    assert_hidden(response.text, caplog.text, client.get("/metrics").text)


def test_an_answer_repeats_the_prompt_and_the_log_does_not(client: TestClient, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        response = client.post("/v1/segment", **as_json(prompts=[SECRET]))
    assert response.json()["results"][0]["prompt"] == SECRET
    assert_hidden(caplog.text, client.get("/metrics").text)


def assert_hidden(*texts: str) -> None:
    for text in texts:
        assert not [word for word in SECRET.split() if word in text.lower()], text
