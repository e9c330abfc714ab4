"""Refused requests, one row for each rule: exact status and type; none of them reaches a replica."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from .http_cases import PNG, PNG_BASE64, FakeBackend, as_json, events, make_client, multipart, picture, raw

JSON = {"content-type": "application/json"}
BOUNDARY = {"content-type": "multipart/form-data; boundary=b"}


def text(content: str | bytes, **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": JSON | headers}


def box(*xyxy: Any, **fields: Any) -> dict[str, Any]:
    return as_json(boxes=[{"xyxy": list(xyxy)} | fields])


def image(data: bytes) -> dict[str, Any]:
    return multipart({"prompts": ["crack"]}, data)


def without(name: str) -> dict[str, Any]:
    fields = {"prompts": ["crack"], "image_base64": PNG_BASE64}
    del fields[name]
    return {"json": fields}


def part(name: str, content: str, *, filename: str | None = None) -> str:
    file = f'; filename="{filename}"' if filename else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{content}\r\n'


def huge_png() -> bytes:
    """200,000 x 200,000 pixels in a few bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def icon() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "ICO")
    return file.getvalue()


def fill(name: str, value: str) -> dict[str, Any]:
    """A JSON body with a value that Python's encoder would not write."""
    return text(f'{{"prompts": ["crack"], "image_base64": "{PNG_BASE64}", "{name}": {value}}}')


BODIES = {
    "no body": ({}, 415, "unsupported_media_type"),
    "text": ({"content": "x", "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
    "compressed": (text("{}", **{"content-encoding": "gzip"}), 415, "unsupported_media_type"),
    "compressed on its way": (text("{}", **{"transfer-encoding": "gzip, chunked"}), 415, "unsupported_media_type"),
    "json: UTF-16": (text('{"prompts": ["a"]}'.encode("utf-16")), 400, "malformed_body"),
    "json: UTF-16 without a mark": (text('{"prompts": ["a"]}'.encode("utf-16-le")), 400, "malformed_body"),
    "json: UTF-32": (text('{"prompts": ["a"]}'.encode("utf-32-be")), 400, "malformed_body"),
    "json: byte order mark": (text('{"prompts": ["a"]}'.encode("utf-8-sig")), 400, "malformed_body"),
    "json: cut off": (text('{"prompts": ["a"'), 400, "malformed_body"),
    "json: latin-1": (text(b'{"prompts": ["\xe9"]}'), 400, "malformed_body"),
    "json: very deep": (text("[" * 50_000), 400, "malformed_body"),
    "json: very long number": (text('{"threshold": ' + "9" * 6000 + "}"), 400, "malformed_body"),
    "json: a list": (text("[]"), 422, "invalid_request"),
    "json: repeated name": (fill("prompts", '["b"]'), 422, "invalid_request"),
    "json: repeated name within": (fill("boxes", '[{"label": 1, "label": 0}]'), 422, "invalid_request"),
    "json: with query": (as_json() | {"params": "threshold=0.4"}, 422, "invalid_request"),
    "multipart: no boundary": (text("x", **{"content-type": "multipart/form-data"}), 400, "malformed_body"),
    "multipart: cut off": (text(part("request", "{}"), **BOUNDARY), 400, "malformed_body"),
    "multipart: latin-1": (
        text(part("request", '{"prompts": ["\xe9"]}').encode("latin-1") + b"--b--\r\n", **BOUNDARY),
        400,
        "malformed_body",
    ),
    "multipart: another code": (
        text(part("request", "{}") + "--b--\r\n", **{"content-type": BOUNDARY["content-type"] + "; charset=punycode"}),
        400,
        "malformed_body",
    ),
    "multipart: no image": ({"files": {"request": (None, '{"prompts": ["a"]}')}}, 422, "invalid_request"),
    "multipart: image is no file": (
        text(part("image", "x") + "--b--\r\n", **BOUNDARY),
        422,
        "invalid_request",
    ),
    "multipart: two images": ({"files": [("image", ("a", PNG)), ("image", ("b", PNG))]}, 422, "invalid_request"),
    "multipart: two requests": (
        {"files": [("image", ("a", PNG)), ("request", (None, "{}")), ("request", (None, "{}"))]},
        422,
        "invalid_request",
    ),
    "multipart: another part": ({"files": {"image": ("a", PNG), "mask": ("b", PNG)}}, 422, "invalid_request"),
    "multipart: many parts": ({"files": [(f"p{n}", (None, "x")) for n in range(50)]}, 400, "malformed_body"),
    "multipart: large request": (multipart('{"prompts": ["' + "a" * 300_000 + '"]}'), 413, "body_too_large"),
    "multipart: request is no json": (multipart("prompts=crack"), 400, "malformed_body"),
    "too large by its header": (raw(image=PNG + bytes(200_000)), 413, "body_too_large"),
    "too large of unknown length": (
        {"content": events([PNG] + [bytes(50_000)] * 5), "headers": {"content-type": "image/png"}},
        413,
        "body_too_large",
    ),
}
IMAGES = {
    "none": (without("image_base64"), 422, "invalid_request"),
    "empty file": (image(b""), 422, "invalid_image"),
    "text": (image(b"hello world, this is no image"), 415, "unsupported_image"),
    "icon": (image(icon()), 415, "unsupported_image"),
    "postscript": (image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 415, "unsupported_image"),
    "png: signature alone": (image(PNG[:8]), 422, "invalid_image"),
    "png: header broken": (image(PNG[:12] + b"XXXX" + PNG[16:]), 422, "invalid_image"),
    "too many pixels": (image(picture((101, 100))), 413, "image_too_large"),
    "forty thousand million pixels": (image(huge_png()), 413, "image_too_large"),
    "base64: no base64": (as_json(image_base64="not base64!"), 400, "malformed_body"),
    "base64: letters beyond ASCII": (as_json(image_base64="é" * 8), 400, "malformed_body"),
    "base64: empty": (as_json(image_base64=""), 422, "invalid_image"),
    "base64: data address in percents": (as_json(image_base64="data:image/png,%89PNG"), 400, "malformed_body"),
    "address": (
        without("image_base64") | {"json": {"prompts": ["a"], "image_url": "http://x/a.png"}},
        422,
        "invalid_request",
    ),
    "file and base64": (multipart({"prompts": ["a"], "image_base64": PNG_BASE64}), 422, "invalid_request"),
    "file and id": (multipart({"prompts": ["a"], "image_id": "img_" + "0" * 64}), 422, "invalid_request"),
    "id: path": ({"json": {"prompts": ["a"], "image_id": "../../etc/passwd"}}, 422, "invalid_request"),
    "id: line break at its end": (
        {"json": {"prompts": ["a"], "image_id": "img_" + "0" * 64 + "\n"}},
        422,
        "invalid_request",
    ),
}
PROMPTS = {
    "missing": (without("prompts"), 422, "invalid_request"),
    "none": (as_json(prompts=[]), 422, "invalid_request"),
    "text instead of a list": (as_json(prompts="crack"), 422, "invalid_prompt"),
    "a number": (as_json(prompts=[3]), 422, "invalid_prompt"),
    "empty": (as_json(prompts=[""]), 422, "invalid_prompt"),
    "spaces": (as_json(prompts=["  \u00a0"]), 422, "invalid_prompt"),
    "invisible": (as_json(prompts=["\u200b\u200d"]), 422, "invalid_prompt"),
    "line break": (as_json(prompts=["a\nb"]), 422, "invalid_prompt"),
    "half a character": (text('{"prompts": ["\\ud800"]}'), 422, "invalid_prompt"),
    "long": (as_json(prompts=["a" * 41]), 422, "invalid_prompt"),
    "many": (as_json(prompts=["a"] * 5), 422, "invalid_prompt"),
    "raw: no UTF-8": (raw("prompts=%FF"), 422, "invalid_request"),
}
BOXES = {
    "negative alone": (as_json(prompts=[], boxes=[{"xyxy": [0, 0, 9, 9], "label": 0}]), 422, "invalid_request"),
    "three numbers": (box(1, 2, 3), 422, "invalid_box"),
    "five numbers": (box(1, 2, 3, 4, 5), 422, "invalid_box"),
    "text": (box(1, 2, "3", 4), 422, "invalid_box"),
    "truth value": (box(True, 2, 3, 4), 422, "invalid_box"),
    "no corners": (as_json(boxes=[{"label": 1}]), 422, "invalid_box"),
    "list instead of object": (as_json(boxes=[[1, 2, 3, 4]]), 422, "invalid_box"),
    "unknown name": (box(1, 2, 3, 4, lable=1), 422, "invalid_box"),
    "label 2": (box(1, 2, 3, 4, label=2), 422, "invalid_box"),
    "label true": (box(1, 2, 3, 4, label=True), 422, "invalid_box"),
    "no width": (box(5, 2, 5, 9), 422, "invalid_box"),
    "left of the image": (box(-1, 2, 5, 9), 422, "invalid_box"),
    "below the image": (box(1, 2, 5, 49), 422, "invalid_box"),
    "right of the image": (box(1, 2, 64.5, 9), 422, "invalid_box"),
    "infinite by its exponent": (fill("boxes", '[{"xyxy": [1, 2, 1e999, 4]}]'), 422, "invalid_box"),
    "NaN": (fill("boxes", '[{"xyxy": [NaN, 2, 3, 4]}]'), 422, "invalid_request"),
    "many": (as_json(boxes=[{"xyxy": [1, 2, 3, 4]}] * 4), 422, "invalid_box"),
    "raw: three numbers": (raw("boxes=1,2,3"), 422, "invalid_box"),
    "raw: nan": (raw("boxes=nan,2,3,4,1"), 422, "invalid_box"),
}
PARAMETERS = {
    "unknown": (as_json(treshold=0.5), 422, "invalid_request"),
    "threshold as text": (as_json(threshold="0.5"), 422, "invalid_request"),
    "threshold true": (as_json(threshold=True), 422, "invalid_request"),
    "threshold 1.01": (as_json(threshold=1.01), 422, "invalid_request"),
    "threshold below 0": (as_json(threshold=-0.1), 422, "invalid_request"),
    "threshold NaN": (fill("threshold", "NaN"), 422, "invalid_request"),
    "nms_iou 2": (as_json(nms_iou=2), 422, "invalid_request"),
    "merge as number": (as_json(merge=1), 422, "invalid_request"),
    "nms unknown": (as_json(nms="soft"), 422, "invalid_request"),
    "threshold of a prompt": (as_json(prompt_thresholds={"crack": 0.5}), 422, "invalid_request"),
    "max_detections 0": (as_json(max_detections=0), 422, "invalid_request"),
    "max_detections 201": (as_json(max_detections=201), 422, "invalid_request"),
    "max_detections 1.5": (as_json(max_detections=1.5), 422, "invalid_request"),
    "masks unknown": (as_json(masks="svg"), 422, "invalid_request"),
    "raw: unknown": (raw("prompts=a&foo=1"), 422, "invalid_request"),
    "raw: twice": (raw("prompts=a&threshold=0.1&threshold=0.2"), 422, "invalid_request"),
    "raw: underscore": (raw("prompts=a&max_detections=1_0"), 422, "invalid_request"),
    "raw: blank": (raw("prompts=a&max_detections=%201"), 422, "invalid_request"),
    "raw: plus": (raw("prompts=a&max_detections=%2B1"), 422, "invalid_request"),
    "raw: leading zero": (raw("prompts=a&max_detections=01"), 422, "invalid_request"),
    "raw: yes": (raw("prompts=a&merge=yes"), 422, "invalid_request"),
    "raw: other digits": (raw("prompts=a&max_detections=\u0661"), 422, "invalid_request"),
    "raw: no number": (raw("prompts=a&threshold=high"), 422, "invalid_request"),
    "raw: nan": (raw("prompts=a&threshold=nan"), 422, "invalid_request"),
}
ADAPTERS = {
    "unknown": (as_json(adapter="nope"), 404, "adapter_not_found"),
    "empty": (as_json(adapter=""), 422, "invalid_adapter"),
    "a number": (as_json(adapter=1), 422, "invalid_adapter"),
    "parent folder": (as_json(adapter="../cracks"), 422, "invalid_adapter"),
    "line break at its end": (as_json(adapter="cracks\n"), 422, "invalid_adapter"),
    "long": (as_json(adapter="a" * 101), 422, "invalid_adapter"),
    "unknown image": ({"json": {"prompts": ["a"], "image_id": "img_" + "0" * 64}}, 404, "image_not_found"),
}
TABLE = {"bodies": BODIES, "images": IMAGES, "prompts": PROMPTS, "boxes": BOXES, "parameters": PARAMETERS}
REFUSED = [pytest.param(*row, id=f"{table}-{name}") for table, rows in TABLE.items() for name, row in rows.items()]


@pytest.mark.parametrize(("body", "status", "type"), REFUSED)
def test_refused_before_a_replica_is_called(body: dict[str, Any], status: int, type: str):
    backend = FakeBackend()
    with make_client(backend) as client:
        response = client.post("/v1/segment", **body)
    assert (response.status_code, response.json()["error"]["type"]) == (status, type), response.text
    assert backend.calls == []


@pytest.mark.parametrize(("body", "status", "type"), [pytest.param(*row, id=name) for name, row in ADAPTERS.items()])
def test_unknown_and_invalid_ids(body: dict[str, Any], status: int, type: str):
    response = make_client().post("/v1/segment", **body)
    assert (response.status_code, response.json()["error"]["type"]) == (status, type), response.text


UPLOADS = {
    "no image": ({"json": {}}, 422, "invalid_request"),
    "with prompts": (multipart({"prompts": ["a"]}), 422, "invalid_request"),
    "with prompts in json": ({"json": {"image_base64": PNG_BASE64, "prompts": ["a"]}}, 422, "invalid_request"),
    "raw with a query": (raw("prompts=a"), 422, "invalid_request"),
    "no image file": ({"files": {"image": ("a", b"no image at all")}}, 415, "unsupported_image"),
    "too many pixels": (raw("", picture((101, 100))), 413, "image_too_large"),
}


@pytest.mark.parametrize(("body", "status", "type"), [pytest.param(*row, id=name) for name, row in UPLOADS.items()])
def test_refused_uploads(body: dict[str, Any], status: int, type: str):
    backend = FakeBackend()
    response = make_client(backend).post("/v1/images", **body)
    assert (response.status_code, response.json()["error"]["type"]) == (status, type), response.text
    assert backend.kept == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (as_json(treshold=0.5), ["treshold", "threshold"]),
        (as_json(boxes=[{"xyxy": [1, 2, 3, "4"]}]), ["boxes[0].xyxy[3]", "number"]),
        (as_json(image_url="http://x"), ["not fetched"]),
        (as_json(threshold=7), ["threshold", "less than or equal to 1"]),
        (as_json(prompts=["fine", "x" * 50]), ["prompts[1]", "50", "40"]),
        (box(1, 2, 65, 9), ["boxes[0]", "64 x 48"]),
        (as_json(adapter="../a"), ["adapter", "letters, digits"]),
        (text('{"prompts": ["a"]}'.encode("utf-16")), ["UTF-16", "expected UTF-8"]),
        (text('{"prompts": ["a"]}'.encode("utf-8-sig")), ["byte order mark"]),
        (image(icon()), ["ICO", "JPEG"]),
    ],
)
def test_messages_name_the_field_and_the_remedy(body: dict[str, Any], words: list[str]):
    message = make_client().post("/v1/segment", **body).json()["error"]["message"]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (as_json(prompts=["fine", "x" * 50]), "prompts[1]"),
        (as_json(prompts=["fine", "a\nb"]), "prompts[1]"),
        (as_json(prompts=["fine", " "]), "prompts[1]"),
        (as_json(prompts=["fine", 3]), "prompts[1]"),
        (as_json(prompts=["a"] * 5), "prompts"),
        (as_json(prompts=[]), "prompts"),
        (box(1, 2, 65, 9), "boxes[0]"),
        (box(5, 2, 5, 9), "boxes[0]"),
        (box(1, 2, "3", 4), "boxes[0].xyxy[2]"),
        (box(1, 2, 3, 4, lable=1), "boxes[0].lable"),
        (box(1, 2, 3, 4, **{"no name": 1}), "boxes[0]"),
        (as_json(boxes=[{"xyxy": [1, 2, 3, 4]}] * 4), "boxes"),
        (raw("boxes=1,2,3,4,1&boxes=1,2"), "boxes[1]"),
        (as_json(treshold=0.5), "treshold"),
        (as_json(**{"no name": 1}), None),
        (as_json(threshold=7), "threshold"),
        (as_json(max_detections=201), "max_detections"),
        (as_json(adapter="../a"), "adapter"),
        (fill("masks", '"rle", "masks": "png"'), "masks"),
        (raw("prompts=a&threshold=0.1&threshold=0.2"), "threshold"),
        (image(b"text"), "image"),
        (image(PNG[:8]), "image"),
        (image(picture((101, 100))), "image"),
        (as_json(image_base64="not base64!"), "image_base64"),
        (without("image_base64"), "image"),
        ({"json": {"prompts": ["a"], "image_id": "img_" + "0" * 64}}, "image_id"),
        (text("[]"), None),
        (text('{"prompts": ["a"'), None),
    ],
)
def test_the_field_at_fault_is_named(body: dict[str, Any], field: str | None):
    assert make_client().post("/v1/segment", **body).json()["error"]["field"] == field


@pytest.mark.parametrize("secret", ["my secret words", "<script>alert(1)</script>"])
def test_messages_do_not_repeat_the_request(secret: str):
    bodies = [as_json(**{secret: 1}), as_json(prompts=[secret + "\n"]), as_json(adapter=secret), as_json(masks=secret)]
    bodies += [text(json.dumps({"prompts": secret})), text(secret), raw(f"prompts=a&threshold={secret}")]
    for body in bodies:
        response = make_client().post("/v1/segment", **body)
        assert response.status_code in (400, 422)
        assert secret not in response.text
