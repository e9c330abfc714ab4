"""The same clicks through Python, plain HTTP, the client and the command line give the same masks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lora.cli import main
from sam3lora.client import Client
from sam3lora.client.segment_results import Rle
from sam3lora.inference.predictor import Predictor
from serve_app.settings import AdapterSettings, Batching, ServeSettings

from .http_cases import picture, raw
from .local_service import local_service

PNG = picture((60, 90))
PIXELS = np.asarray(Image.open(io.BytesIO(PNG)))
CLICKS = [(30, 20, 1), (70, 40, 0), (12, 50, 1)]
BOX = (10, 5, 60, 50)
POST = {"threshold": 0.0, "max_detections": 3}


@pytest.fixture(scope="module")
def service(clickable_base: Path, clickable_root: Path) -> Iterator[TestClient]:
    batching = Batching(encode_ahead=False)
    settings = ServeSettings(
        model=str(clickable_base), batching=batching, adapters=AdapterSettings(root=clickable_root)
    )
    with TestClient(local_service(settings)) as service:
        yield service


@pytest.fixture(scope="module")
def predictor(clickable_base: Path) -> Predictor:
    return Predictor(str(clickable_base), device="cpu")


@pytest.fixture
def client(service: TestClient) -> Iterator[Client]:
    def handle(request: httpx.Request) -> httpx.Response:
        headers = {"content-type": request.headers.get("content-type", "")}
        answer = service.request(request.method, request.url.path, content=request.content, headers=headers)
        return httpx.Response(answer.status_code, content=answer.content, headers={"content-type": "application/json"})

    with Client("http://service.test", transport=httpx.MockTransport(handle), max_retries=0) as client:
        yield client


def ask(
    service: TestClient,
    image_id: str,
    clicks: list[tuple],
    options: Mapping[str, object] | None = None,
    **shown: object,
) -> dict:
    given = [{"x": x, "y": y, "label": label} for x, y, label in clicks]
    asked = {"image_id": image_id, "objects": [{"clicks": given, **shown}], **(options or {})}
    response = service.post("/v1/refine", json=asked)
    assert response.status_code == 200, response.text
    return response.json()["objects"][0]


def same(*rles: Rle) -> None:
    """But for pixels at the edge: logits that are kept are rounded."""
    first, *others = (coco_mask.decode(rle) for rle in rles)
    assert 0 < first.mean() < 1
    for other in others:
        assert (first != other).mean() < 0.002


def test_clicks_one_after_the_other(service: TestClient, client: Client, predictor: Predictor):
    image_id = service.post("/v1/images", **raw("", PNG)).json()["image_id"]
    by_client = client.interact(PNG)
    in_python = predictor.interact(PIXELS).click(CLICKS[:1])
    by_http = ask(service, image_id, CLICKS[:1])
    first = by_client.click(*CLICKS[0])
    same(by_http["mask"], first.rle, in_python.rle)
    assert [by_http["score"], first.score] == pytest.approx([in_python.score] * 2, abs=1e-5)
    assert len(by_http["alternatives"]) == len(first.alternatives) == 2
    for number in (1, 2):
        before = by_http["mask_id"]
        by_http = ask(service, image_id, CLICKS[: number + 1], mask={"mask_id": before})
        in_python.add(*CLICKS[number])
        same(by_http["mask"], by_client.click(*CLICKS[number]).rle, in_python.rle)
    in_python.undo()
    same(by_client.undo().rle, in_python.rle)


def test_a_detection_and_a_box(service: TestClient, client: Client, predictor: Predictor):
    by_client = client.interact(PNG)
    (found,) = client.segment(by_client.image, ["crack"], keep_masks=True, **POST)
    session = predictor.interact(PIXELS)
    in_python = session.detect("crack", **POST)
    assert len(in_python) == found.num_detections > 0
    by_client.start(found, 0)
    corrected = by_client.click(*CLICKS[0])
    session.refine(in_python[0], CLICKS[:1])
    by_http = ask(
        service,
        by_client.image.image_id,
        CLICKS[:1],
        box=[float(side) for side in found.boxes_xyxy[0]],
        mask={"mask_id": found.mask_ids[0]},
    )
    same(by_http["mask"], corrected.rle, in_python[0].rle)
    by_client.start()
    same(
        ask(service, by_client.image.image_id, [], box=list(BOX))["mask"], by_client.box(BOX).rle, session.box(BOX).rle
    )


PAIRS = [
    {"click_adapter": "edges"},
    {"adapter": "towers", "click_adapter": "over-towers"},
]


@pytest.mark.parametrize("named", PAIRS)
def test_a_click_adapter_alone_and_beside_an_adapter(
    named: dict[str, str],
    service: TestClient,
    client: Client,
    clickable_base: Path,
    clickable_root: Path,
    tmp_path: Path,
):
    folders = {role: clickable_root / name for role, name in named.items()}
    image_id = service.post("/v1/images", **raw("", PNG)).json()["image_id"]
    in_python = Predictor(str(clickable_base), device="cpu", **folders).interact(PIXELS).click(CLICKS[:1])
    by_http = ask(service, image_id, CLICKS[:1], named)
    results = client.refine(PNG, {"clicks": CLICKS[:1]}, **named)
    same(by_http["mask"], results[0].rle, in_python.rle)
    assert [by_http["score"], results[0].score] == pytest.approx([in_python.score] * 2, abs=1e-5)
    assert (results.adapter, results.click_adapter) == (named.get("adapter"), named["click_adapter"])
    session = client.interact(PNG, **named)
    session.click(*CLICKS[0])
    by_http = ask(service, image_id, CLICKS[:2], named, mask={"mask_id": by_http["mask_id"]})
    in_python.add(*CLICKS[1])
    same(by_http["mask"], session.click(*CLICKS[1]).rle, in_python.rle)
    (tmp_path / "photo.png").write_bytes(PNG)
    words = ["infer", "--model", clickable_base, "--image", tmp_path / "photo.png", "--weights", *folders.values()]
    words += ["--click", "30,20", "--output", tmp_path / "output.png", "--json", tmp_path / "d.json"]
    assert main([str(word) for word in words]) == 0
    (by_cli,) = json.loads((tmp_path / "d.json").read_text())["images"]
    same(by_cli["clicked"]["mask"], results[0].rle)


def test_a_mask_as_a_picture_is_the_same(client: Client):
    png = client.refine(PNG, {"box": BOX}, masks="png")[0]
    np.testing.assert_array_equal(png.mask, client.refine(PNG, {"box": BOX})[0].mask)
