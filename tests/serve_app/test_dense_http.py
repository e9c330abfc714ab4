"""POST /v1/dense at the HTTP side: the forms of a request, the answer in each form, and what is refused."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from serve_app.http.errors import ServeError
from serve_app.messages import DenseCall

from .http_cases import PNG, PNG_BASE64, PNG_KEY, FakeBackend, make_client, multipart, raw

ASK = {"adapter": "land-cover", "output": "rle", "classes": ["water", "bare soil"], "threshold": 0.25}
WAYS: dict[str, dict[str, Any]] = {
    "multipart": multipart(ASK),
    "json": {"json": ASK | {"image_base64": PNG_BASE64}},
    "raw": raw("adapter=land-cover&output=rle&classes=water&classes=bare%20soil&threshold=0.25"),
}


def asked(**fields: Any) -> dict[str, Any]:
    return {"json": {"adapter": "land-cover", "image_base64": PNG_BASE64} | fields}


def png(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_all_forms_of_a_request_are_equal():
    for body in WAYS.values():
        backend = FakeBackend()
        response = make_client(backend).post("/v1/dense", **body)
        assert response.status_code == 200, response.text
        (call,) = backend.labelled
        assert (call.image.data, call.image.key) == (PNG, PNG_KEY)
        assert (call.adapter, call.output, call.classes, call.threshold) == (
            "land-cover",
            "rle",
            ("water", "bare soil"),
            0.25,
        )
        assert 0 < call.timeout_s <= 30


def test_what_is_not_given_is_the_adapters():
    backend = FakeBackend()
    make_client(backend).post("/v1/dense", **asked())
    (call,) = backend.labelled
    assert (call.output, call.classes, call.threshold) == (None, None, None)


def test_the_label_map():
    answer = make_client().post("/v1/dense", **asked()).json()
    assert set(answer) == {"request_id", "image", "adapter", "task", "classes", "label_png", "timing_ms"}
    assert (answer["image"], answer["adapter"], answer["task"]) == (
        {"width": 64, "height": 48},
        "land-cover",
        "dense",
    )
    assert answer["classes"] == [
        {"name": "background", "area_px": 36 * 64, "share": 0.75, "value": 0},
        {"name": "water", "area_px": 12 * 64, "share": 0.25, "value": 1},
    ]
    labels_HW = np.asarray(png(answer["label_png"]))
    assert labels_HW.shape == (48, 64)
    assert (labels_HW[:12] == 1).all()
    assert (labels_HW[12:] == 0).all()
    assert {"body", "check", "segmenter", "decode", "forward", "total"} <= set(answer["timing_ms"])


def test_masks_probabilities_and_areas_alone():
    client = make_client()
    of_rle = client.post("/v1/dense", **asked(output="rle")).json()
    assert "label_png" not in of_rle
    assert [coco_mask.decode(one["mask"]).sum() for one in of_rle["classes"]] == [36 * 64, 12 * 64]
    of_png = client.post("/v1/dense", **asked(output="probability_png")).json()
    assert np.asarray(png(of_png["classes"][1]["mask"])).shape == (48, 64)
    areas = client.post("/v1/dense", **asked(output="none")).json()
    assert [set(one) for one in areas["classes"]] == [{"name", "area_px", "share"}] * 2


def test_an_uploaded_image():
    client = make_client()
    uploaded = client.post("/v1/images", **raw("")).json()["image_id"]
    of_upload = {"adapter": "land-cover", "image_id": uploaded}
    assert client.post("/v1/dense", json=of_upload).status_code == 200
    gone = client.post("/v1/dense", json=of_upload | {"image_id": "img_" + 64 * "0"})
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "image_not_found")


REFUSED = {
    "no adapter": ({"adapter": None}, "invalid_adapter", "adapter"),
    "an id that is none": ({"adapter": "../parts"}, "invalid_adapter", "adapter"),
    "an unknown output": ({"output": "png"}, "invalid_request", "output"),
    "no classes": ({"classes": []}, "invalid_request", "classes"),
    "a class twice": ({"classes": ["a", "b", "a"]}, "invalid_request", "classes[2]"),
    "a class that is no text": ({"classes": [1]}, "invalid_request", "classes[0]"),
    "more classes than there can be": ({"classes": [str(n) for n in range(256)]}, "invalid_request", "classes"),
    "a threshold of 0": ({"threshold": 0}, "invalid_request", "threshold"),
    "a threshold of 1": ({"threshold": 1}, "invalid_request", "threshold"),
    "a threshold in words": ({"threshold": "0.5"}, "invalid_request", "threshold"),
    "prompts": ({"prompts": ["a"]}, "invalid_request", "prompts"),
    "two images": ({"image_id": "img_" + 64 * "0"}, "invalid_request", "image"),
    "no image": ({"image_base64": None}, "invalid_request", "image"),
    "base64 of nothing": ({"image_base64": "?"}, "malformed_body", "image_base64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_requests(name: str):
    fields, type, field = REFUSED[name]
    backend = FakeBackend()
    response = make_client(backend).post("/v1/dense", **asked(**fields))
    error = response.json()["error"]
    assert (error["type"], error["field"]) == (type, field), error
    assert backend.labelled == []


def test_an_adapter_is_needed():
    response = make_client().post("/v1/dense", json={"image_base64": PNG_BASE64})
    assert (response.status_code, response.json()["error"]["field"]) == (422, "adapter")


def test_errors_of_the_replica_and_the_limit_of_the_answer():
    def wrong(call: DenseCall) -> ServeError:
        return ServeError("wrong_task", f"adapter {call.adapter!r} finds objects")

    client = make_client(FakeBackend(label_answer=wrong))
    response = client.post("/v1/dense", **asked())
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["field"]) == (422, "wrong_task", "adapter")
    assert 'route="/v1/dense"' in client.get("/metrics").text
    small = make_client(max_answer_bytes=100).post("/v1/dense", **asked())
    assert (small.status_code, small.json()["error"]["type"]) == (422, "answer_too_large")


def test_the_description_has_the_fields():
    document = make_client().get("/openapi.json").json()
    asked = document["components"]["schemas"]["DenseRequest"]
    assert set(asked["properties"]) == {"adapter", "output", "classes", "threshold", "image_base64", "image_id"}
    assert asked["required"] == ["adapter"]
    parameters = {one["name"] for one in document["paths"]["/v1/dense"]["post"]["parameters"]}
    assert parameters == {"X-Request-ID", "adapter", "output", "classes", "threshold"}
