"""POST /v1/refine at the HTTP side: the forms of a request, the answer in each form, and what is refused."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
from serve_app.http.errors import ServeError
from serve_app.messages import RefinedObject

from .http_cases import PNG, PNG_BASE64, PNG_KEY, FakeBackend, make_client, multipart, picture, raw, rectangle

IN, OUT = {"x": 20, "y": 10.5}, {"x": 63, "y": 47, "label": 0}
KEPT = "msk_" + 32 * "a"


def asked(*objects: Any, **fields: Any) -> dict[str, Any]:
    return {"json": {"image_base64": PNG_BASE64, "objects": list(objects or ({"clicks": [IN]},))} | fields}


def test_all_forms_of_a_request_are_equal():
    request = {
        "objects": [
            {"clicks": [IN, OUT], "mask": {"mask_id": KEPT}},
            {"box": [0, 1, 64, 48], "mask": rectangle(2, 2, 9, 9)},
        ],
        "adapter": "cracks",
        "click_adapter": "edges",
        "clicks_vision": "base",
        "multimask": "never",
        "max_hole_area": 8,
        "max_sprinkle_area": 10_000,
    }
    for body in (multipart(request), {"json": request | {"image_base64": PNG_BASE64}}):
        backend = FakeBackend()
        response = make_client(backend).post("/v1/refine", **body)
        assert response.status_code == 200, response.text
        (call,) = backend.refined
        assert (call.image.data, call.image.key, call.affinity) == (PNG, PNG_KEY, PNG_KEY)
        first, second = call.objects
        assert first == RefinedObject((Click(20, 10.5, 1), Click(63, 47, 0)), None, KEPT)
        assert (second.clicks, second.box_xyxy) == ((), (0, 1, 64, 48))
        assert isinstance(second.mask, dict)
        assert coco_mask.decode(second.mask).sum() == 49
        assert (call.adapter, call.clicks_vision, call.multimask) == ("cracks", "base", False)
        assert call.click_adapter == response.json()["click_adapter"] == "edges"
        assert call.cleaning == MaskCleaning(8, 10_000)
        assert 0 < call.timeout_s <= 30


def test_what_is_not_given_has_defaults():
    backend = FakeBackend()
    make_client(backend).post("/v1/refine", **asked())
    (call,) = backend.refined
    assert (call.adapter, call.clicks_vision, call.multimask, call.objects[0].mask) == (None, "adapter", None, None)
    assert call.click_adapter is None
    assert call.cleaning == MaskCleaning(0, 0)


def striped(width: int) -> dict[str, Any]:
    """A mask of every other row of 1000, whose code has a character for each pixel."""
    mask = np.zeros((1000, width), np.uint8, order="F")
    mask[1::2] = 1
    code = coco_mask.encode(mask)["counts"].decode()
    assert len(code) == 1000 * width
    return {"clicks": [IN], "mask": {"size": [1000, width], "counts": code}}


@pytest.mark.parametrize("as_multipart", [False, True])
def test_outlines_may_be_as_large_as_those_of_large_images(as_multipart: bool):
    def ask(*objects: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        image = picture(tuple(objects[0]["mask"]["size"]), "JPEG")
        in_json = {"image_base64": base64.b64encode(image).decode(), "objects": objects}
        body = multipart({"objects": objects}, image) if as_multipart else {"json": in_json}
        limits = {"max_body_bytes": 10**8, "max_megapixels": 2.0}
        answer = make_client(**limits).post("/v1/refine", **body)
        return answer.status_code, answer.json().get("error") or {}

    assert ask(striped(1000), striped(1000))[0] == 200
    status, error = ask(striped(1050))
    assert (status, error["type"], error["field"]) == (422, "invalid_mask", "objects[0].mask.counts")
    assert "1050000 characters, expected at most 1048576: name a kept mask by its mask_id" in error["message"]
    status, error = ask(*[striped(1000)] * 9)
    assert (status, error["type"]) == (413, "body_too_large")
    if not as_multipart:
        assert "8388608 bytes of run-length codes, got 9000000: name kept masks by their mask_id" in error["message"]


def test_the_answer_has_the_chosen_mask_and_the_others():
    body = asked({"clicks": [IN]}, {"box": [4, 2, 12, 10], "clicks": [IN]})
    answer = make_client().post("/v1/refine", **body).json()
    assert set(answer) == {"request_id", "image", "adapter", "click_adapter", "objects", "timing_ms"}
    assert (answer["image"], answer["adapter"]) == ({"width": 64, "height": 48}, None)
    first, second = answer["objects"]
    assert set(first) == {"score", "object_score", "box_xyxy", "area_px", "mask", "mask_id", "alternatives"}
    assert [first["score"], first["object_score"], first["area_px"]] == [0.9, 0.75, 144]
    assert first["box_xyxy"] == [14, 4, 26, 16]
    assert first["mask"] == rectangle(14, 4, 26, 16)
    assert [one["score"] for one in first["alternatives"]] == [0.8, 0.7]
    assert all(set(one) == {"score", "box_xyxy", "area_px", "mask", "mask_id"} for one in first["alternatives"])
    assert len({first["mask_id"], *(one["mask_id"] for one in first["alternatives"])}) == 3
    assert (second["box_xyxy"], second["alternatives"]) == ([4, 2, 12, 10], [])
    assert {"body", "check", "segmenter", "decode", "forward", "total"} <= set(answer["timing_ms"])


def test_forms_of_masks():
    client = make_client()
    answers = [
        client.post("/v1/refine", **asked({"box": [4, 2, 12, 10]}, masks=form)).json()["objects"][0]
        for form in ("polygon", "png", "none")
    ]
    outline, png, nothing = answers
    assert outline["mask"] == [[4, 2, 4, 10, 12, 10, 12, 2]]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png["mask"]))))
    assert (pixels.shape, pixels[2:10, 4:12].all(), (pixels > 0).sum()) == ((48, 64), True, 64)
    assert "mask" not in nothing
    assert [one["area_px"] for one in answers] == [64] * 3


def test_an_uploaded_image():
    client = make_client()
    uploaded = client.post("/v1/images", **raw("")).json()["image_id"]
    body = {"image_id": uploaded, "objects": [{"clicks": [IN]}]}
    assert client.post("/v1/refine", json=body).status_code == 200
    gone = client.post("/v1/refine", json=body | {"image_id": "img_" + 64 * "0"})
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "image_not_found")


def test_detections_have_ids_of_masks_where_they_are_kept():
    backend = FakeBackend()
    client = make_client(backend)
    question = {"prompts": ["a"], "image_base64": PNG_BASE64}
    (found,) = client.post("/v1/segment", json=question | {"keep_masks": True}).json()["results"]
    assert [one["mask_id"] for one in found["detections"]] == ["msk_" + 32 * "0", "msk_" + 31 * "0" + "1"]
    (found,) = client.post("/v1/segment", json=question | {"adapter": "cracks"}).json()["results"]
    assert all("mask_id" not in one for one in found["detections"])
    by_query = client.post("/v1/segment", **raw("prompts=a&keep_masks=true&adapter=cracks"))
    assert "mask_id" in by_query.json()["results"][0]["detections"][0]
    # A kept mask is where its image is; otherwise an adapter's calls go to a replica that holds the adapter.
    assert [call.affinity == PNG_KEY for call in backend.calls] == [True, False, True]
    assert [call.keep_masks for call in backend.calls] == [True, False, True]


REFUSED = {
    "no objects": ({"objects": []}, "invalid_request", "objects"),
    "three objects of two": ({"objects": [{"clicks": [IN]}] * 3}, "invalid_request", "objects"),
    "nothing that shows the object": ({"objects": [{"mask": {"mask_id": KEPT}}]}, "invalid_request", "objects[0]"),
    "only what does not belong to it": ({"objects": [{"clicks": [OUT]}]}, "invalid_click", "objects[0].clicks"),
    "more clicks than allowed": ({"objects": [{"clicks": [IN] * 4}]}, "invalid_click", "objects[0].clicks"),
    "a click on the right border": (
        {"objects": [{"clicks": [IN, {"x": 64, "y": 0}]}]},
        "invalid_click",
        "objects[0].clicks[1]",
    ),
    "a click above": ({"objects": [{"clicks": [{"x": 0, "y": -0.5}]}]}, "invalid_click", "objects[0].clicks[0]"),
    "a label of 2": ({"objects": [{"clicks": [IN | {"label": 2}]}]}, "invalid_click", "objects[0].clicks[0].label"),
    "a label of true": (
        {"objects": [{"clicks": [IN | {"label": True}]}]},
        "invalid_click",
        "objects[0].clicks[0].label",
    ),
    "no y": ({"objects": [{"clicks": [{"x": 1}]}]}, "invalid_click", "objects[0].clicks[0].y"),
    "x in words": ({"objects": [{"clicks": [{"x": "1", "y": 1}]}]}, "invalid_click", "objects[0].clicks[0].x"),
    "a click as a list": ({"objects": [{"clicks": [[1, 2]]}]}, "invalid_click", "objects[0].clicks[0]"),
    "a box of three": ({"objects": [{"box": [1, 2, 3]}]}, "invalid_box", "objects[0].box"),
    "a box without an area": ({"objects": [{"box": [5, 5, 5, 9]}]}, "invalid_box", "objects[0].box"),
    "a box beyond the image": ({"objects": [{"box": [0, 0, 64, 48.5]}]}, "invalid_box", "objects[0].box"),
    "an id that is none": (
        {"objects": [{"clicks": [IN], "mask": {"mask_id": "msk_1"}}]},
        "invalid_mask",
        "objects[0].mask.mask_id",
    ),
    "a mask and an id": (
        {"objects": [{"clicks": [IN], "mask": rectangle(0, 0, 1, 1) | {"mask_id": KEPT}}]},
        "invalid_mask",
        "objects[0].mask",
    ),
    "a mask without counts": ({"objects": [{"clicks": [IN], "mask": {"size": [48, 64]}}]}, "invalid_mask", None),
    "an empty mask object": ({"objects": [{"clicks": [IN], "mask": {}}]}, "invalid_mask", "objects[0].mask"),
    "runs that are too short": (
        {"objects": [{"clicks": [IN], "mask": {"size": [48, 64], "counts": "52203"}}]},
        "invalid_mask",
        "objects[0].mask.counts",
    ),
    "a code cut off": (
        {"objects": [{"clicks": [IN], "mask": {"size": [48, 64], "counts": "\x7f"}}]},
        "invalid_mask",
        "objects[0].mask.counts",
    ),
    "a mask of another size": (
        {"objects": [{"clicks": [IN], "mask": rectangle(0, 0, 1, 1, (64, 48))}]},
        "invalid_mask",
        "objects[0].mask.size",
    ),
    "another word for masks": ({"multimask": True}, "invalid_request", "multimask"),
    "another trunk": ({"clicks_vision": "mine"}, "invalid_request", "clicks_vision"),
    "a negative area": ({"max_hole_area": -1}, "invalid_request", "max_hole_area"),
    "a huge area": ({"max_sprinkle_area": 10_001}, "invalid_request", "max_sprinkle_area"),
    "half a pixel": ({"max_sprinkle_area": 0.5}, "invalid_request", "max_sprinkle_area"),
    "an area as text": ({"max_hole_area": "8"}, "invalid_request", "max_hole_area"),
    "an area that is none": ({"max_hole_area": None}, "invalid_request", "max_hole_area"),
    "an area of an object": ({"objects": [{"clicks": [IN], "max_hole_area": 8}]}, "invalid_request", None),
    "prompts": ({"prompts": ["a"]}, "invalid_request", "prompts"),
    "points": ({"objects": [{"points": [[1, 2]]}]}, "invalid_request", "objects[0].points"),
    "an id of an adapter that is none": ({"adapter": "../a"}, "invalid_adapter", "adapter"),
    "an id of a click adapter that is none": ({"click_adapter": "a b"}, "invalid_adapter", "click_adapter"),
    "a click adapter that is no text": ({"click_adapter": 3}, "invalid_adapter", "click_adapter"),
    "two images": ({"image_id": "img_" + 64 * "0"}, "invalid_request", "image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_requests(name: str):
    fields, type, field = REFUSED[name]
    backend = FakeBackend()
    response = make_client(backend, max_objects=2, max_clicks=3).post("/v1/refine", **asked(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (422, type), error
    if field is not None:
        assert error["field"] == field, error
    assert backend.refined == []


def test_objects_are_needed_in_every_form():
    client = make_client()
    for body in ({"json": {"image_base64": PNG_BASE64}}, raw("")):
        response = client.post("/v1/refine", **body)
        assert (response.status_code, response.json()["error"]["field"]) == (422, "objects")


@pytest.mark.parametrize(
    ("type", "status"), [("mask_not_found", 404), ("no_click_head", 501), ("wrong_task", 422), ("overloaded", 503)]
)
def test_errors_of_the_replica(type: str, status: int):
    client = make_client(FakeBackend(refine_answer=lambda call: ServeError(type, "why")))
    response = client.post("/v1/refine", **asked())
    assert (response.status_code, response.json()["error"]["type"]) == (status, type)
    assert 'route="/v1/refine"' in client.get("/metrics").text


def test_the_limit_of_the_answer():
    small = make_client(max_answer_bytes=100).post("/v1/refine", **asked())
    assert (small.status_code, small.json()["error"]["type"]) == (422, "answer_too_large")


def test_the_listing_says_whether_clicks_are_answered():
    assert make_client().get("/v1/adapters").json()["clicks"] is True
