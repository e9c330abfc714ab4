"""What the clients send, and what they make of answers."""

from __future__ import annotations

import hashlib
import io
import json
import re

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from sam3lora.client import Client, NotFound, UploadedImage

from .scripted import MASK_HW, MASKS, URL, Script, answer, fault, parts_of, segmented


def test_the_request_of_a_call(kind):
    script = Script(segmented)
    results = script.client(kind, api_key="secret").segment(
        b"image", ["red thing", "čára"], adapter="cracks", threshold=0.4, boxes=[((0, 1, 2, 3), 1)], masks="rle"
    )

    (request,) = script.requests
    assert (request.method, request.url.path) == ("POST", "/v1/segment")
    assert request.headers["authorization"] == "Bearer secret"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request.headers["x-request-id"])
    parts = parts_of(request)
    assert parts["image"] == b"image"
    assert json.loads(parts["request"]) == {
        "prompts": ["red thing", "čára"],
        "boxes": [{"xyxy": [0, 1, 2, 3], "label": 1}],
        "adapter": "cracks",
        "threshold": 0.4,
        "masks": "rle",
    }

    assert (results.request_id, results.size_hw, results.adapter) == ("r1", (4, 6), "cracks")
    assert results.timing_ms["total"] == 2.5
    assert [result.prompt for result in results] == ["red thing", "čára"]
    first, none = results
    assert (first.num_detections, first.presence) == (1, 0.8)
    assert first.scores.dtype == np.float32
    np.testing.assert_allclose(first.boxes_xyxy, [[2, 1, 5, 3]])
    np.testing.assert_array_equal(first.masks, MASK_HW[None])
    assert first.rles == [MASKS["rle"]]
    assert first.areas_px.tolist() == [6]
    # Nothing found keeps the shapes.
    assert (none.scores.shape, none.boxes_xyxy.shape, none.masks.shape) == ((0,), (0, 4), (0, 4, 6))


def test_masks_in_every_form():
    client = Script(segmented).client(Client)
    png = client.segment(b"x", ["a"], masks="png")[0]
    np.testing.assert_array_equal(png.masks, MASK_HW[None])
    outlined = client.segment(b"x", ["a"], masks="polygon")[0]
    assert outlined.polygons == [[[2, 1, 5, 1, 5, 3, 2, 3]]]
    boxes = client.segment(b"x", ["a"], masks="none")[0]
    assert boxes.areas_px is None
    for result in (outlined, boxes):
        with pytest.raises(ValueError, match="masks='rle'"):
            _ = result.masks
    with pytest.raises(ValueError, match="came as 'png'"):
        _ = png.rles
    script = Script(lambda request: httpx.Response(200, json=answer({"prompts": ["a"]}, size_hw=(8, 8))))
    with pytest.raises(ValueError, match=r"expected a mask of \(8, 8\), got \(4, 6\)"):
        _ = script.client(Client).segment(b"x", ["a"])[0].masks


def test_images_of_every_kind(kind, tmp_path):
    rng = np.random.default_rng(0)
    pixels_HW3 = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels_HW3)
    path = tmp_path / "a.jpg"
    picture.save(path)
    script = Script(segmented)
    client = script.client(kind)
    for image in (path, str(path), path.read_bytes(), picture, pixels_HW3):
        client.segment(image, ["a"])
    sent = [parts_of(request)["image"] for request in script.requests]
    # Files go as they are; pixels go as a PNG, which loses nothing.
    assert sent[:3] == [path.read_bytes()] * 3
    for data in sent[3:]:
        opened = Image.open(io.BytesIO(data))
        assert opened.format == "PNG"
        np.testing.assert_array_equal(np.asarray(opened), pixels_HW3)


def test_a_pil_image_is_turned_once(tmp_path):
    # Red above blue, stored so that EXIF has to turn it: sent upright, and without the note to turn it again.
    upright = Image.new("RGB", (4, 8), "red")
    upright.paste("blue", (0, 4, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    path = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    script = Script(segmented)
    with Image.open(path) as picture:
        assert picture.size == (8, 4)
        script.client(Client).segment(picture, ["a"])
    sent = Image.open(io.BytesIO(parts_of(script.requests[0])["image"]))
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(upright))
    assert 0x0112 not in sent.getexif()


@pytest.mark.parametrize("mode", ["CMYK", "F", "YCbCr"])
def test_pil_modes_that_png_lacks(mode):
    script = Script(segmented)
    script.client(Client).segment(Image.new(mode, (3, 2)), ["a"])
    assert Image.open(io.BytesIO(parts_of(script.requests[0])["image"])).size == (3, 2)


@pytest.mark.parametrize(
    ("image", "options", "complaint"),
    [
        (np.zeros((4, 4), np.uint8), {}, "uint8 (4, 4)"),
        (np.zeros((4, 4, 3)), {}, "float64 (4, 4, 3)"),
        (np.zeros((0, 4, 3), np.uint8), {}, "(0, 4, 3)"),
        (7, {}, "got int"),
        ("nosuch.jpg", {}, "nosuch"),
        (b"x", {"treshold": 0.4}, "no argument treshold"),
        (b"x", {"boxes": [[0, 1, 2, 3]]}, "expected boxes as"),
        (b"x", {"boxes": [((0, 1, 2), 1)]}, "expected boxes as"),
        (b"x", {"boxes": [((0, 1, 2, "x"), 1)]}, "expected boxes as"),
    ],
)
def test_wrong_images_and_arguments_are_not_sent(image, options, complaint):
    script = Script(segmented)
    with pytest.raises((TypeError, ValueError, OSError), match=re.escape(complaint)):
        script.client(Client).segment(image, ["a"], **options)
    assert not script.requests


def test_urls_and_keys():
    for url in ("127.0.0.1:8000", "ftp://x", ""):
        with pytest.raises(ValueError, match="expected a URL"):
            Client(url)
    with pytest.raises(ValueError, match="line break") as caught:
        Client(URL, api_key="secret\n")
    assert "secret" not in str(caught.value)
    script = Script(segmented)
    with Client(f"{URL}/sam/", transport=httpx.MockTransport(script.handle)) as client:
        client.segment(b"x", "crack")
    (request,) = script.requests
    assert request.url.path == "/sam/v1/segment"
    # Missing options are not sent.
    assert json.loads(parts_of(request)["request"]) == {"prompts": ["crack"]}
    assert "authorization" not in request.headers


def test_adapters(kind):
    listed = {"id": "a", "prompts": ["crack"], "rank": 8, "size_bytes": 10, "adapts": ["detr"], "resident": True}
    broken = {"id": "b", "error": "no weights", "a_field_of_tomorrow": 1}
    edges = {"id": "edges", "task": "clicks", "clicks_vision": "adapter", "vision_adapters": ["a"]}
    script = Script(httpx.Response(200, json={"adapters": [listed, broken, edges]}))
    first, second, third = script.client(kind).adapters()
    assert (third.clicks_vision, third.vision_adapters) == ("adapter", ("a",))
    assert (first.clicks_vision, first.vision_adapters) == (None, ())
    assert (first.id, first.prompts, first.rank, first.resident, first.error) == ("a", ("crack",), 8, True, None)
    assert (second.prompts, second.rank, second.resident, second.error) == ((), None, False, "no weights")


def test_adapters_page_by_page(kind):
    def page(request: httpx.Request) -> httpx.Response:
        asked = dict(request.url.params)
        names = [name for name in ("a1", "a2", "b", "a3") if asked.get("search", "") in name]
        following = sorted(name for name in names if name > asked.get("after", ""))
        most = min(int(asked["limit"]), 2)  # the service may send smaller pages
        shown, left = following[:most], following[most:]
        return httpx.Response(200, json={"adapters": [{"id": id} for id in shown], "next": shown[-1] if left else None})

    def found(**asked: object) -> list[str]:
        return [info.id for info in Script(page).client(kind).adapters(**asked)]

    assert found() == ["a1", "a2", "a3", "b"]
    assert found(search="a") == ["a1", "a2", "a3"]
    assert found(search="a", limit=1) == ["a1"]
    assert found(limit=3) == ["a1", "a2", "a3"]
    assert found(search="nothing") == []
    with pytest.raises(ValueError, match="at least 1"):
        found(limit=0)
    # a service of an earlier version sends all at once
    everything = Script(httpx.Response(200, json={"adapters": [{"id": "a"}, {"id": "b"}, {"id": "c"}]}))
    assert [info.id for info in everything.client(kind).adapters(limit=2)] == ["a", "b"]


# --- uploaded images ---


def kept(request: httpx.Request) -> httpx.Response:
    image_id = "img_" + hashlib.sha256(parts_of(request)["image"]).hexdigest()
    return httpx.Response(200, json={"image_id": image_id, "width": 6, "height": 4, "request_id": "r", "timing_ms": {}})


def segmented_by_id(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=answer(json.loads(request.content)))


def test_an_uploaded_image_is_not_sent_again(kind):
    script = Script(kept, segmented_by_id)
    client = script.client(kind)
    image = client.upload(b"image")
    assert (image.image_id, image.size_hw) == ("img_" + hashlib.sha256(b"image").hexdigest(), (4, 6))
    client.segment(image, ["a"])
    assert json.loads(script.requests[1].content) == {"image_id": image.image_id, "prompts": ["a"]}


def test_an_evicted_image_is_sent_again(kind):
    script = Script(kept, fault(404, "image_not_found"), kept, segmented_by_id)
    client = script.client(kind)
    assert client.segment(client.upload(b"image"), ["a"])[0].num_detections == 1
    assert [request.url.path for request in script.requests] == ["/v1/images", "/v1/segment"] * 2
    assert parts_of(script.requests[2])["image"] == b"image"


@pytest.mark.parametrize(
    ("data", "answers", "num_requests"),
    [
        (None, [fault(404, "image_not_found")], 1),  # bytes are not at hand
        (b"image", [fault(404, "adapter_not_found")], 1),  # something else is missing
        (b"image", [fault(404, "image_not_found"), kept, fault(404, "image_not_found")], 3),  # no image is kept
    ],
)
def test_errors_that_another_upload_does_not_help(data, answers, num_requests):
    script = Script(*answers)
    with pytest.raises(NotFound):
        script.client(Client).segment(UploadedImage("img_1", data=data), ["a"])
    assert len(script.requests) == num_requests


# --- readiness ---


def test_ready(kind):
    assert Script(httpx.Response(200, json={})).client(kind).ready() is True
    for cause in (fault(503, "not_ready", **{"Retry-After": "1"}), httpx.ConnectError("x"), httpx.ReadTimeout("x")):
        script = Script(cause)
        assert script.client(kind).ready() is False
        assert (len(script.requests), script.waits) == (1, [])
    with pytest.raises(NotFound):
        Script(fault(404)).client(kind).ready()
