"""The HTTP contract: three ways to ask, answers, headers, keys, limits, and what happens when clients leave."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lora.config.post_processing import PostProcessing
from serve_app.http.schemas import SegmentRequest

from .http_cases import (
    PNG,
    PNG_BASE64,
    PNG_KEY,
    FakeBackend,
    as_json,
    make_client,
    multipart,
    picture,
    raw,
)

ASK = {
    "prompts": ["crack", "pot hole"],
    "boxes": [{"xyxy": [1.5, 2, 30, 40], "label": 1}, {"xyxy": [0, 0, 64, 48], "label": 0}],
    "adapter": "cracks",
    "threshold": 0.25,
    "nms": "box",
    "nms_iou": 0.75,
    "merge": True,
    "merge_iou": 0.5,
    "max_detections": 7,
    "masks": "rle",
}
QUERY = (
    "prompts=crack&prompts=pot%20hole&boxes=1.5,2,30,40,1&boxes=0,0,64,48,0&adapter=cracks&threshold=0.25"
    "&nms=box&nms_iou=0.75&merge=true&merge_iou=0.5&max_detections=7&masks=rle"
)
WAYS: dict[str, dict[str, Any]] = {
    "multipart": multipart(ASK),
    "multipart with the request as a file": {
        "files": {"image": ("a.png", PNG), "request": ("r.json", json.dumps(ASK), "application/json")}
    },
    "json": {"json": ASK | {"image_base64": PNG_BASE64}},
    "json with a data address": {"json": ASK | {"image_base64": f"data:image/png;base64,{PNG_BASE64}"}},
    "raw": raw(QUERY),
    "raw bytes": raw(QUERY, kind="application/octet-stream"),
}


def test_all_forms_of_a_request_are_equal():
    calls = []
    for body in WAYS.values():
        backend = FakeBackend()
        response = make_client(backend).post("/v1/segment", **body)
        assert response.status_code == 200, response.text
        (call,) = backend.calls
        assert call.image.data == PNG
        assert 0 < call.timeout_s <= 30
        calls.append((call.image, call.prompts, call.boxes, call.adapter, call.post_processing, call.masks))
    assert all(call == calls[0] for call in calls)
    assert calls[0][0].key == PNG_KEY
    assert calls[0][2][0].xyxy == (1.5, 2.0, 30.0, 40.0)
    assert calls[0][4] == {
        name: ASK[name] for name in ("threshold", "nms", "nms_iou", "merge", "merge_iou", "max_detections")
    }


FILE_HEAD = "Content-Disposition: form-data; name=\"image\"; filename*=UTF-8''%C3%A4.png"
PROMPT_PART = '--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"prompts": ["\xe4"]}\r\n'
FORM = f"{PROMPT_PART}--b\r\n{FILE_HEAD}\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        as_json(max_detections=5.0, threshold=0, boxes=[{"xyxy": [1, 2, 30, 40], "label": 1.0}]),
        as_json() | {"headers": {"content-encoding": ""}},
        as_json() | {"headers": {"content-encoding": "Identity"}},
        raw("prompts=crack&threshold=1e-1&max_detections=5&merge=True&boxes=1,2,30.5,4e1"),
        {
            "content": FORM.encode() + PNG + b"\r\n--b--\r\n",
            "headers": {"content-type": 'multipart/form-data; boundary="b"; charset=UTF-8'},
        },
    ],
    ids=["whole numbers with a point", "no encoding", "identity", "query numbers", "only a file name of RFC 8187"],
)
def test_unusual_forms_that_are_right(sent: dict[str, Any]):
    response = make_client().post("/v1/segment", **sent)
    assert response.status_code == 200, response.text


def test_every_answer_has_the_request_id_of_its_header():
    client = make_client()
    answers = [
        client.post("/v1/segment", **as_json()),
        client.post("/v1/images", **raw("")),
        client.get("/v1/adapters"),
    ]
    for answer in answers:
        assert answer.json()["request_id"] == answer.headers["x-request-id"] != ""


def test_answer():
    response = make_client().post("/v1/segment", **as_json(prompts=["crack", "hole"], adapter="cracks"))
    answer = response.json()
    assert set(answer) == {"request_id", "image", "adapter", "results", "timing_ms"}
    assert answer["image"] == {"width": 64, "height": 48}
    assert answer["adapter"] == "cracks"
    assert [result["prompt"] for result in answer["results"]] == ["crack", "hole"]
    assert set(answer["results"][0]) == {"prompt", "presence", "num_detections", "detections"}
    detection = answer["results"][0]["detections"][0]
    assert set(detection) == {"score", "box_xyxy", "area_px", "mask"}
    assert coco_mask.decode(detection["mask"]).sum() == detection["area_px"] == 60
    assert {"forward", "total"} <= set(answer["timing_ms"])
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("fields", [{}, {"threshold": None, "nms": None, "merge": None}], ids=["missing", "null"])
def test_missing_post_processing_is_left_to_the_adapter_and_prompts_are_passed_on_unchanged(fields: dict[str, Any]):
    backend = FakeBackend()
    prompts = [" crack ", "crack", "crack", "Ähre 👩‍🌾"]
    answer = make_client(backend).post("/v1/segment", **as_json(prompts=prompts, masks="none", **fields)).json()
    (call,) = backend.calls
    assert (call.post_processing, call.adapter, call.masks) == ({}, None, False)
    assert list(call.prompts) == [result["prompt"] for result in answer["results"]] == prompts
    assert set(answer["results"][0]["detections"][0]) == {"score", "box_xyxy"}


def test_boxes_alone():
    body = as_json(prompts=[], boxes=[{"xyxy": [1, 1, 9, 9]}])
    assert make_client().post("/v1/segment", **body).json()["results"][0]["prompt"] == "visual"


def test_a_request_has_every_post_processing_setting_but_prompt_thresholds():
    names = set(PostProcessing.model_fields) - {"prompt_thresholds"}
    assert names == set(PostProcessing.model_fields) & set(SegmentRequest.model_fields)
    for name in names:
        value = getattr(PostProcessing(), name)
        assert getattr(SegmentRequest.model_validate({name: value}), name) == value


def test_boxes_refer_to_the_image_after_exif_orientation():
    """Stored 64 x 48 and turned by EXIF: 48 wide, 64 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = base64.b64encode(picture(format="JPEG", exif=exif)).decode()
    client = make_client()
    inside, outside = ([{"xyxy": xyxy}] for xyxy in ([1, 1, 48, 64], [1, 1, 64, 48]))
    assert client.post("/v1/segment", **as_json(image_base64=turned, boxes=inside)).status_code == 200
    assert client.post("/v1/segment", **as_json(image_base64=turned, boxes=outside)).status_code == 422


@pytest.mark.parametrize(
    "body", [{"files": {"image": ("a", PNG)}}, {"json": {"image_base64": PNG_BASE64}}, raw("")], ids=str
)
def test_upload_then_ask(body: dict[str, Any]):
    backend = FakeBackend()
    client = make_client(backend)
    uploaded = client.post("/v1/images", **body).json()
    assert uploaded["image_id"] == f"img_{PNG_KEY}"
    assert (uploaded["width"], uploaded["height"]) == (64, 48)
    answer = client.post("/v1/segment", json={"prompts": ["crack"], "image_id": uploaded["image_id"]})
    assert answer.status_code == 200
    assert backend.calls[0].image.data is None


def test_adapters():
    answer = make_client().get("/v1/adapters").json()
    assert answer["base_post_processing"] == PostProcessing().model_dump()
    adapters = answer["adapters"]
    assert adapters[0] == {
        "id": "cracks",
        "task": "detection",
        "prompts": ["crack"],
        "classes": [],
        "rank": 8,
        "size_bytes": 2048,
        "adapts": ["detr_decoder"],
        "clicks_vision": None,
        "vision_adapters": [],
        "post_processing": PostProcessing(threshold=0.3, prompt_thresholds={"crack": 0.2}).model_dump(),
        "resident": True,
        "error": None,
    }
    assert (adapters[1]["error"], adapters[1]["post_processing"]) == ("trained on another base model", None)


def test_health_and_readiness():
    backend = FakeBackend(is_ready=False)
    client = make_client(backend)
    assert client.get("/healthz").json() == {"status": "ok"}
    refused = client.get("/readyz")
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "not_ready")
    assert int(refused.headers["retry-after"]) >= 1
    backend.is_ready = True
    assert client.get("/readyz").status_code == 200


def test_metrics_of_all_replicas_without_client_text():
    client = make_client()
    client.post("/v1/segment", **as_json(prompts=["secret words"]))
    client.post("/v1/segment", **as_json(adapter="secret"))
    client.get("/secret")
    text = client.get("/metrics").text
    assert 'sam3lora_queue_length{replica="first"} 3.0' in text
    assert 'outcome="ok"' in text
    assert 'outcome="adapter_not_found"' in text
    assert 'route="other"' in text
    assert "secret" not in text
