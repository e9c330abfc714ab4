"""What parsing costs: bodies made to be expensive are refused early, or parsed off the event loop."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.http import body
from serve_app.http.errors import ServeError
from serve_app.http.schemas import SegmentRequest

from .http_cases import PNG_BASE64, FakeBackend, as_json, make_client, multipart

LARGE = "A" * (body.MAX_JSON_BYTES + 1)
NUMBERS = "[" + "1," * 150_000 + "1]"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "text",
    [
        f'{{"prompts": {NUMBERS}}}',
        f'{{"image_base64": "{PNG_BASE64}", "prompts": {NUMBERS}}}',
        f'{{"prompts": {NUMBERS}, "image_base64": "{LARGE}"}}',
        f'{{"adapter": "\\"image_base64\\":\\"", "prompts": {NUMBERS}}}',
        f'{{"adapter": "\\"image_base64", "x": {NUMBERS}, "a": ": \\"{LARGE}"}}',
        f'{{"image_base64": "a\\"", "prompts": {NUMBERS}}}',
        f'{{"adapter": "{LARGE}"}}',
        f'{{"counts": "A", "prompts": {NUMBERS}}}',
        f'{{"adapter": "\\"counts\\":\\"", "prompts": {NUMBERS}}}',
        f'{{"a": "\\"counts", "x": {NUMBERS}, "b": ": \\"{LARGE}"}}',
        '{"objects": [' + '{"counts": ""},' * 50_000 + "0]}",
        f'{{"counts": "A\\"{LARGE}"}}',  # no code has a quote: what follows it is other JSON
        f'{{"objects": [{{"counts": "{"A" * (body.MAX_CODES_BYTES + 1)}"}}]}}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/segment", "/v1/images"])
def test_json_besides_the_image_must_be_short(monkeypatch: pytest.MonkeyPatch, text: str, path: str):
    with monkeypatch.context() as patch:
        patch.setattr(body.json, "loads", lambda *_, **__: pytest.fail("parsed"))
        response = make_client(max_body_bytes=10**7).post(path, content=text, headers=JSON)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "body_too_large")


@pytest.mark.parametrize("as_file", [False, True])
def test_a_long_part_of_json_is_too_large_however_it_comes(as_file: bool):
    text = "[" + " " * (body.MAX_JSON_BYTES + body.MAX_CODES_BYTES) + "]"
    sent = multipart(text)
    if as_file:
        sent["files"]["request"] = ("r.json", sent.pop("data")["request"])
    response = make_client().post("/v1/segment", **sent)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "body_too_large")


@pytest.mark.parametrize("slash", ["/", r"\/"], ids=["plain", "escaped, as PHP writes it"])
@pytest.mark.parametrize("space", ["", " \n"])
def test_base64_images_may_be_large(slash: str, space: str):
    image = f"AAA{slash}" * 100_000
    parsed = body.parse_json(f'{{"prompts": ["a"], "image_base64"{space}:{space}"{image}", "masks": "rle"}}'.encode())
    assert parsed == {"prompts": ["a"], "image_base64": "AAA/" * 100_000, "masks": "rle"}


def test_a_repeated_name_is_found_in_one_pass():
    num_compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal num_compared
            num_compared += 1
            return str.__eq__(self, other)

    names = [Name(number) for number in range(500)] + [Name("z"), Name("z")]
    with pytest.raises(ServeError, match="z is given twice"):
        body._once([(name, 0) for name in names])
    assert num_compared < 5 * len(names)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("as_multipart", [False, True])
def test_long_json_is_parsed_in_a_thread(monkeypatch: pytest.MonkeyPatch, as_multipart: bool, as_file: bool):
    threads: list[threading.Thread] = []
    loops: list[threading.Thread] = []
    parse, check_headers = body.parse_json, body._check_headers

    def parse_json(text: str | bytes) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return parse(text)

    def on_the_loop(*args: Any) -> None:
        loops.append(threading.current_thread())
        check_headers(*args)

    monkeypatch.setattr(body, "parse_json", parse_json)
    monkeypatch.setattr(body, "_check_headers", on_the_loop)
    fields = {"prompts": ["crack"], "adapter": "x" * 100_000}
    sent = multipart(fields) if as_multipart else as_json(**fields)
    if as_multipart and as_file:
        sent["files"]["request"] = ("r.json", json.dumps(sent.pop("data")["request"]))
    make_client().post("/v1/segment", **sent)
    assert len(threads) == len(loops) == 1
    assert threads != loops


@pytest.mark.parametrize(
    "fields", [{"prompts": [1] * 1000}, {"boxes": [1] * 1000}, {"boxes": [{"xyxy": ["a"] * 1000}]}]
)
def test_validation_stops_at_the_first_error(fields: dict[str, Any]):
    with pytest.raises(ValidationError) as caught:
        SegmentRequest.model_validate(fields)
    assert caught.value.error_count() == 1
    backend = FakeBackend()
    assert make_client(backend).post("/v1/segment", **as_json(**fields)).status_code == 422
    assert backend.calls == []
