"""The Label Studio backend, by the JSON that Label Studio documents and sends."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sam3lora.client import Client

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "label_studio"))

from backend import Backend, create_app, make_backend
from label_config import ConfigFault, read_label_config
from regions import read_drawn, rows_under
from task_images import TaskImages

from ..client.scripted import parts_of, rle
from .test_label_studio_brush import decode_brush_rle

WIDTH, HEIGHT = 40, 20


def config(*controls: str) -> str:
    labels = '<Label value="Crack" prompt="hairline crack"/><Label value="Moss"/>'
    tags = "".join(f'<{tag} name="{tag}-tag" toName="img">{labels}</{tag}>' for tag in controls)
    return f'<View><Image name="img" value="$photo"/>{tags}</View>'


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(file, format="PNG")
    return file.getvalue()


DATA_URI = "data:image/png;base64," + base64.b64encode(png()).decode()


class Service:
    """Finds two rectangles of each first prompt, or answers with a fault; remembers what it was asked."""

    boxes = ((4, 2, 12, 10), (20, 5, 36, 15))

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.images: list[bytes] = []
        self.faults: dict[bytes, tuple[int, str]] = {}

    def handle(self, request: httpx.Request) -> httpx.Response:
        parts = parts_of(request)
        image, asked = parts["image"], json.loads(parts["request"])
        self.images.append(image)
        self.requests.append(asked)
        if image in self.faults or b"*" in self.faults:
            status, kind = self.faults.get(image) or self.faults[b"*"]
            return httpx.Response(status, json={"error": {"type": kind, "message": "m", "request_id": "r"}})
        found = [self.detection(box, asked["masks"]) for box in self.boxes]
        results = [
            {"prompt": prompt, "presence": 1.0, "num_detections": len(hits), "detections": hits}
            for prompt, hits in zip(asked["prompts"], [found, *[[] for _ in asked["prompts"][1:]]])
        ]
        body = {"request_id": "r", "image": {"width": WIDTH, "height": HEIGHT}, "adapter": asked["adapter"]}
        return httpx.Response(200, json={**body, "results": results, "timing_ms": {}})

    def detection(self, box: tuple[int, int, int, int], masks: str) -> dict[str, Any]:
        x0, y0, x1, y1 = box
        found = {"score": 0.75, "box_xyxy": list(box)}
        if masks == "polygon":
            # Along the edges of pixels, with a corner that is not needed.
            found |= {"area_px": 0, "mask": [[x0, y0, x0 + 1, y0, x1, y0, x1, y1, x0, y1]]}
        if masks == "rle":
            found |= {"area_px": 0, "mask": rle(mask_of(box))}
        return found


def mask_of(box: tuple[int, int, int, int]) -> np.ndarray:
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask_HW[box[1] : box[3], box[0] : box[2]] = True
    return mask_HW


@pytest.fixture
def service() -> Service:
    return Service()


def open_backend(service: Service, images: TaskImages | None = None, **options: Any) -> TestClient:
    client = Client("http://service.test", transport=httpx.MockTransport(service.handle), max_retries=0)
    return TestClient(create_app(Backend(client, images or TaskImages(), **options)))


def predict_body(xml: str, *addresses: str, context: Any = None) -> dict[str, Any]:
    """As `api_connector.py` of Label Studio makes it."""
    return {
        "tasks": [{"id": 7 + row, "data": {"photo": address}, "meta": {}} for row, address in enumerate(addresses)],
        "project": "3.1718000000",
        "label_config": xml,
        "params": {"login": None, "password": None, "context": context},
    }


# --- the protocol ---


def test_a_project_is_set_up(service):
    app = open_backend(service, adapter="cracks")
    assert app.get("/health").json()["status"] == "UP"
    setup = {
        "project": "3.1",
        "schema": config("BrushLabels"),
        "hostname": "http://label-studio.test",
        "access_token": "t",
        "extra_params": {},
    }
    assert app.post("/setup", json=setup).json() == {"model_version": "sam3lora-cracks"}
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 3}, "annotation": {}}
    assert app.post("/webhook", json=event).status_code == 200
    assert not service.requests


@pytest.mark.parametrize(
    ("control", "masks"), [("BrushLabels", "rle"), ("PolygonLabels", "polygon"), ("RectangleLabels", "none")]
)
def test_labels_become_prompts(service, control, masks):
    app = open_backend(service, adapter="cracks", threshold=0.3)
    answer = app.post("/predict", json=predict_body(config(control), DATA_URI, DATA_URI)).json()

    asked = {"prompts": ["hairline crack", "Moss"], "adapter": "cracks", "threshold": 0.3, "masks": masks}
    assert service.requests == [asked, asked]
    assert service.images == [png(), png()]
    assert len(answer["results"]) == 2
    for prediction in answer["results"]:
        assert (prediction["model_version"], prediction["score"]) == ("sam3lora-cracks", 0.75)
        assert len(prediction["result"]) == 2
        for region in prediction["result"]:
            kind = control.lower()
            assert (region["type"], region["from_name"], region["to_name"]) == (kind, f"{control}-tag", "img")
            assert (region["original_width"], region["original_height"], region["image_rotation"]) == (40, 20, 0)
            assert region["value"][kind] == ["Crack"]
            assert region["score"] == 0.75
    ids = [region["id"] for prediction in answer["results"] for region in prediction["result"]]
    assert len(set(ids)) == 4


def test_values_of_regions(service):
    """Rectangles and polygons are in percent, polygons simplified; brushes cover the mask."""

    def value(control: str) -> dict[str, Any]:
        answer = open_backend(service).post("/predict", json=predict_body(config(control), DATA_URI)).json()
        return answer["results"][0]["result"][0]["value"]

    rectangle = {"x": 10.0, "y": 10.0, "width": 20.0, "height": 40.0, "rotation": 0}
    assert value("RectangleLabels").items() >= rectangle.items()
    polygon = value("PolygonLabels")
    assert polygon["closed"] is True
    assert sorted(polygon["points"]) == [[10, 10], [10, 50], [30, 10], [30, 50]]
    brush = value("BrushLabels")
    assert brush["format"] == "rle"
    rgba = decode_brush_rle(brush["rle"]).reshape(HEIGHT, WIDTH, 4)
    np.testing.assert_array_equal(rgba[..., 3] == 255, mask_of(service.boxes[0]))


def test_brushes_are_preferred_and_smart_tools_get_no_output(service):
    xml = config("KeyPointLabels", "RectangleLabels", "PolygonLabels", "BrushLabels")
    assert read_label_config(xml).from_name == "BrushLabels-tag"
    assert read_label_config(xml).prompts == {"Crack": "hairline crack", "Moss": "Moss"}


@pytest.mark.parametrize(
    "xml",
    [
        "<View>",
        "not xml",
        "<View><Image name='i' value='$x'/></View>",
        "<View><Text name='t' value='$x'/><BrushLabels name='b' toName='t'><Label value='a'/></BrushLabels></View>",
        "<View><Image name='i' value='$x'/><BrushLabels name='b' toName='i'/></View>",
        "<!DOCTYPE v [<!ENTITY a 'b'>]><View/>",
    ],
)
def test_unusable_configurations(service, xml):
    with pytest.raises(ConfigFault):
        read_label_config(xml)
    response = open_backend(service).post("/predict", json=predict_body(xml, DATA_URI))
    assert response.status_code == 400
    assert not service.requests


# --- smart tools ---


def key_point(x: float, y: float, *, is_positive: bool = True) -> dict[str, Any]:
    """As in the example of Label Studio's own Segment Anything backend."""
    value = {"x": x, "y": y, "width": 0.3, "labels": ["Moss"], "keypointlabels": ["Moss"]}
    frame = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, "origin": "manual"}
    return {**frame, "value": value, "is_positive": is_positive, "id": "f", "from_name": "k", "type": "keypointlabels"}


def rectangle(x: float, y: float, width: float, height: float) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["Crack"]}
    frame = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {**frame, "value": value, "id": "g", "from_name": "r", "type": "rectanglelabels"}


def test_a_drawn_rectangle_returns_the_object_in_it(service):
    context = {"result": [rectangle(50, 25, 25, 50)]}
    body = predict_body(config("BrushLabels"), DATA_URI, context=context)
    answer = open_backend(service).post("/predict", json=body).json()
    assert service.requests[0]["prompts"] == ["hairline crack"]
    assert service.requests[0]["boxes"] == [{"xyxy": [20, 5, 30, 15], "label": 1}]
    (region,) = answer["results"][0]["result"]
    assert region["value"]["brushlabels"] == ["Crack"]
    rgba = decode_brush_rle(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)
    np.testing.assert_array_equal(rgba[..., 3] == 255, mask_of(service.boxes[1]))

    everything = open_backend(service, all_alike=True).post("/predict", json=body).json()
    assert len(everything["results"][0]["result"]) == 2


def test_key_points_are_small_boxes_where_the_service_answers_no_clicks():
    drawn = read_drawn({"result": [key_point(50, 50), key_point(0, 100, is_positive=False)]})
    assert drawn is not None
    assert (drawn.label, drawn.boxes) == ("Moss", [])
    (first, one), (second, zero) = drawn.as_examples()
    assert (one, zero) == (1, 0)
    np.testing.assert_allclose(first, (19.6, 9.6, 20.4, 10.4))
    np.testing.assert_allclose(second, (0, 19.1, 0.4, 19.9))


def test_drawn_boxes_are_cut_at_the_image_and_others_are_ignored():
    # Percents do not add up to 100 exactly, and a click leaves a rectangle without an area: the service takes neither.
    drawn = read_drawn({"result": [rectangle(70, -1, 30.00000001, 101.5), rectangle(10, 10, 0, 5)]})
    assert drawn is not None
    ((xyxy, label),) = drawn.boxes
    assert label == 1
    np.testing.assert_allclose(xyxy, (28, 0, 40, 20))
    assert xyxy[2] <= WIDTH
    for nothing in ([], [rectangle(10, 10, 0, 5)], [{"type": "brushlabels", "value": {}}]):
        assert read_drawn({"result": nothing}) is None
    assert read_drawn(None) is read_drawn({}) is None


class ClickedService(Service):
    """Outlines the box, or a square around the last click inside."""

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/adapters":
            return httpx.Response(200, json={"adapters": [], "total": 0, "next": None, "clicks": True})
        if request.url.path == "/v1/segment":
            return super().handle(request)
        assert request.url.path == "/v1/refine"
        asked = json.loads(parts_of(request)["request"])
        self.requests.append(asked)
        (shown,) = asked["objects"]
        if "box" in shown:
            x0, y0, x1, y1 = (int(side) for side in shown["box"])
        else:
            x, y = next((int(one["x"]), int(one["y"])) for one in shown["clicks"][::-1] if one["label"])
            x0, y0, x1, y1 = x - 3, y - 3, x + 3, y + 3
        area_px = 0 if x0 < 0 else (x1 - x0) * (y1 - y0)
        found = {"score": 0.8, "object_score": 0.9, "box_xyxy": [x0, y0, x1, y1], "area_px": area_px, "mask_id": None}
        found["alternatives"] = []
        if asked["masks"] == "rle":
            found["mask"] = rle(mask_of((x0, y0, x1, y1)))
        elif asked["masks"] == "polygon":
            found["mask"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        body = {"request_id": "r", "image": {"width": WIDTH, "height": HEIGHT}, "adapter": asked["adapter"]}
        return httpx.Response(200, json={**body, "objects": [found], "timing_ms": {}})


def clicked_regions(service: Service, control: str, *drawn: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    body = predict_body(config(control), DATA_URI, context={"result": list(drawn)})
    (prediction,) = open_made(service, None, **options).post("/predict", json=body).json()["results"]
    return prediction["result"]


def test_key_points_say_what_belongs_to_one_object():
    service = ClickedService()
    (region,) = clicked_regions(service, "BrushLabels", key_point(50, 50), key_point(100, 100, is_positive=False))
    (asked,) = service.requests
    assert asked["objects"] == [
        {"clicks": [{"x": 20, "y": 10, "label": 1}, {"x": 39.5, "y": 19.5, "label": 0}]}
    ]  # in the image: its last pixel begins at 39
    assert (asked["adapter"], asked["masks"]) == (None, "rle")
    assert (region["value"]["brushlabels"], region["score"]) == (["Moss"], 0.8)
    mask_HW = decode_brush_rle(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[..., 3] > 0
    np.testing.assert_array_equal(mask_HW, mask_of((17, 7, 23, 13)))


def test_a_rectangle_with_key_points_in_each_kind_of_region():
    service = ClickedService()
    drawn = (rectangle(50, 25, 25, 50), rectangle(0, 0, 10, 20) | {"is_positive": False})
    (outline,) = clicked_regions(service, "PolygonLabels", *drawn)
    (shown,) = service.requests[0]["objects"]
    assert shown == {"clicks": [{"x": 2, "y": 2, "label": 0}], "box": [20, 5, 30, 15]}
    assert sorted(outline["value"]["points"]) == [[50, 25], [50, 75], [75, 25], [75, 75]]
    (box,) = clicked_regions(service, "RectangleLabels", *drawn)
    assert box["value"].items() >= {"x": 50, "y": 25, "width": 25, "height": 50}.items()
    assert [one["value"]["rectanglelabels"] for one in (box,)] == [["Crack"]]


def test_nothing_under_the_clicks_is_no_region():
    assert clicked_regions(ClickedService(), "BrushLabels", key_point(1, 50)) == []


def test_everything_alike_is_found_by_example():
    service = ClickedService()
    regions = clicked_regions(service, "BrushLabels", key_point(50, 50), all_alike=True)
    assert len(regions) == 2
    assert [box["label"] for box in service.requests[0]["boxes"]] == [1]


def test_objects_under_boxes():
    boxes = np.array([[0, 0, 10, 10], [8, 8, 12, 12], [50, 50, 60, 60]], dtype=np.float32)
    assert rows_under(boxes, [(8.5, 8.5, 11, 11)]) == [1]  # the better of two that overlap
    assert rows_under(boxes, [(1, 1, 9, 9), (2, 2, 9, 9)]) == [0]  # once
    assert rows_under(boxes, [(20, 20, 30, 30)]) == []
    assert rows_under(boxes[:0], [(0, 0, 1, 1)]) == []


# --- faults ---


def test_a_bad_image_leaves_the_other_predictions(service, caplog):
    other = "data:image/png;base64," + base64.b64encode(b"broken").decode()
    service.faults[b"broken"] = (422, "invalid_image")
    body = predict_body(config("RectangleLabels"), DATA_URI, other, "s3://bucket/secret-name.png", DATA_URI)
    answer = open_backend(service).post("/predict", json=body).json()
    assert [len(prediction["result"]) for prediction in answer["results"]] == [2, 0, 0, 2]
    assert "task 8 is left empty" in caplog.text
    assert "secret-name" not in caplog.text


def test_a_single_bad_image_and_a_task_without_one_are_errors(service):
    body = predict_body(config("RectangleLabels"), "s3://bucket/a.png")
    assert open_backend(service).post("/predict", json=body).status_code == 422
    body["tasks"][0]["data"] = {"other": DATA_URI}
    response = open_backend(service).post("/predict", json=body)
    assert response.status_code == 422
    assert "'photo'" in response.json()["detail"]
    assert not service.requests


@pytest.mark.parametrize(("status", "kind"), [(401, "unauthorized"), (404, "adapter_not_found"), (503, "overloaded")])
def test_an_error_of_the_service_is_passed_on(service, status, kind):
    service.faults[b"*"] = (status, kind)
    response = open_backend(service).post("/predict", json=predict_body(config("BrushLabels"), DATA_URI, DATA_URI))
    assert response.status_code == 502
    assert kind in response.json()["detail"]


# --- adapters of task dense ---


class LabellingService(Service):
    """Labels the left half `hairline crack` and nothing `Moss`; its adapter knows another class as well."""

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/adapters":
            adapters = [
                {"id": "road", "task": "dense", "classes": ["background", "hairline crack", "Moss"]},
                {"id": "roads", "task": "detection", "prompts": ["road"]},
            ]
            return httpx.Response(200, json={"adapters": adapters, "total": 2, "next": None})
        assert request.url.path == "/v1/dense"
        asked = json.loads(parts_of(request)["request"])
        self.requests.append(asked)
        masks = {"hairline crack": mask_of((0, 0, WIDTH // 2, HEIGHT)), "Moss": np.zeros((HEIGHT, WIDTH), bool)}
        classes = [
            {"name": name, "area_px": int(masks[name].sum()), "share": masks[name].mean(), "mask": rle(masks[name])}
            for name in asked["classes"]
        ]
        body = {"request_id": "r", "image": {"width": WIDTH, "height": HEIGHT}, "adapter": "road", "task": "dense"}
        return httpx.Response(200, json={**body, "classes": classes, "timing_ms": {}})


def open_made(service: Service, adapter: str | None, **options: Any) -> TestClient:
    client = Client("http://service.test", transport=httpx.MockTransport(service.handle), max_retries=0)
    options = {"threshold": None, "all_alike": False} | options
    return TestClient(create_app(make_backend(client, TaskImages(), adapter=adapter, **options)))


def test_classes_of_pixels_become_brush_masks():
    service = LabellingService()
    app = open_made(service, "road", threshold=0.3)
    (prediction,) = app.post("/predict", json=predict_body(config("BrushLabels"), DATA_URI)).json()["results"]
    assert service.requests == [
        {"adapter": "road", "threshold": 0.3, "output": "rle", "classes": ["hairline crack", "Moss"]}
    ]
    (region,) = prediction["result"]  # nothing is Moss
    assert (region["type"], region["value"]["brushlabels"]) == ("brushlabels", ["Crack"])
    assert (region["original_width"], region["original_height"]) == (WIDTH, HEIGHT)
    mask_HW = decode_brush_rle(region["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[..., 3] > 0
    np.testing.assert_array_equal(mask_HW, mask_of((0, 0, WIDTH // 2, HEIGHT)))


def test_projects_that_a_dense_adapter_cannot_fill():
    app = open_made(LabellingService(), "road")
    outlines = app.post("/predict", json=predict_body(config("PolygonLabels"), DATA_URI))
    assert (outlines.status_code, "BrushLabels" in outlines.json()["detail"]) == (400, True)
    others = config("BrushLabels").replace("hairline crack", "pothole").replace("Moss", "sand")
    answer = app.post("/predict", json=predict_body(others, DATA_URI))
    assert (answer.status_code, "hairline crack" in answer.json()["detail"]) == (400, True)


@pytest.mark.parametrize("adapter", [None, "roads", "unknown"])
def test_other_adapters_are_asked_for_prompts(adapter):
    client = Client("http://service.test", transport=httpx.MockTransport(LabellingService().handle), max_retries=0)
    made = make_backend(client, TaskImages(), adapter=adapter, threshold=None, all_alike=False)
    assert type(made) is Backend
