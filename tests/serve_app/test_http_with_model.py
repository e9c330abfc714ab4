"""HTTP over a real replica of a small model, without Ray."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pycocotools import mask as coco_mask
from sam3lora.engine.segmenter import Segmenter as PlainSegmenter

from sam3lora.engine.detections import PostProcessing
from serve_app.http.errors import ServeError
from serve_app.http.ingress import create_api
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import ImageFile, ImageReply, SegmentCall, SegmentReply
from serve_app.replica.replica import ModelReplica
from serve_app.settings import ServeSettings

SAMPLE = Path(__file__).parents[2] / "serve_app" / "static" / "sample.jpg"


class LocalBackend:
    """A `Backend` of one replica in this process."""

    def __init__(self, replica: ModelReplica) -> None:
        self._replica = replica

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        return await self._replica.segment(call)

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError:
        return await self._replica.keep_image(image, timeout_s)

    async def list_adapters(self) -> list[AdapterResponse] | ServeError:
        return await self._replica.list_adapters()

    async def metrics(self) -> dict[str, str]:
        return dict([await self._replica.named_metrics()])

    async def ready(self) -> bool:
        return await self._replica.ready()


@pytest.fixture(scope="module")
def client(spread_base: Path) -> Iterator[TestClient]:
    settings = ServeSettings(model=str(spread_base))
    replica = ModelReplica(settings)
    with TestClient(create_api(settings, LocalBackend(replica))) as client:  # one event loop for all requests
        yield client
        assert client.portal is not None
        client.portal.call(replica.close)


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    body = {
        "prompts": ["ring", "star"],
        "threshold": 0.1,
        "image_base64": base64.b64encode(SAMPLE.read_bytes()).decode(),
    }
    response = client.post("/v1/segment", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_answers_are_those_of_the_library(client: TestClient, spread_base: Path):
    from sam3lora.data.images import read_image

    image = read_image(SAMPLE, orientation="exif")
    plain = PlainSegmenter(str(spread_base))
    expected = plain.detect(
        plain.encode([image]), ["ring", "star"], post=PostProcessing(threshold=0.1, nms="mask", nms_iou=0.7)
    )[0]
    results = ask(client)["results"]
    for result, found in zip(results, expected, strict=True):
        assert result["prompt"] == found.prompt
        assert result["num_detections"] == len(found)
        assert result["presence"] == pytest.approx(found.presence, abs=1e-3)
        assert [entry["score"] for entry in result["detections"]] == pytest.approx(found.scores.tolist(), abs=1e-3)
    assert sum(result["num_detections"] for result in results) > 0


def test_upload_then_ask_gives_the_same(client: TestClient):
    uploaded = client.post("/v1/images", files={"image": ("a.jpg", SAMPLE.read_bytes())})
    assert uploaded.status_code == 200, uploaded.text
    by_id = client.post(
        "/v1/segment",
        json={"prompts": ["ring", "star"], "threshold": 0.1, "image_id": uploaded.json()["image_id"]},
    ).json()
    again = ask(client)
    assert [result["num_detections"] for result in by_id["results"]] == [
        result["num_detections"] for result in again["results"]
    ]
    assert by_id["image"] == again["image"]
    assert by_id["image"] == {key: uploaded.json()[key] for key in ("width", "height")}


def test_masks_have_the_size_of_the_image(client: TestClient):
    answer = ask(client)
    for result in answer["results"]:
        for detection in result["detections"]:
            mask = coco_mask.decode(detection["mask"])
            assert mask.shape == (answer["image"]["height"], answer["image"]["width"])
            assert mask.sum() == detection["area_px"]


@pytest.mark.parametrize(
    ("fields", "status", "type"),
    [
        ({"adapter": "nope"}, 404, "adapter_not_found"),
        ({"prompts": ["wheel " * 33]}, 422, "invalid_prompt"),
        ({"image_base64": base64.b64encode(SAMPLE.read_bytes()[:2000]).decode()}, 422, "invalid_image"),
    ],
)
def test_what_only_the_replica_can_tell(client: TestClient, fields: dict[str, Any], status: int, type: str):
    body = {"prompts": ["gear"], "image_base64": base64.b64encode(SAMPLE.read_bytes()).decode()} | fields
    response = client.post("/v1/segment", json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (status, type), response.text
