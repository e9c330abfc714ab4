"""The same image and prompts, with no settings given, find the same objects whichever way a user asks."""

from __future__ import annotations

import base64
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from pycocotools import mask as coco_mask

import serve_app
from jobs import predict
from sam3lora import Predictor
from sam3lora.cli import main
from sam3lora.client import Client
from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.model.adapter.folder import record_post_processing
from serve_app.http.ingress import create_api
from serve_app.replica.replica import ModelReplica
from serve_app.settings import AdapterSettings, ServeSettings

ROOT = Path(serve_app.__file__).parents[1]
SAMPLE = ROOT / "serve_app" / "static" / "sample.jpg"
PROMPTS = ["cross", "star"]
# Nothing is at its default, and each setting changes what is found.
RECORDED = PostProcessing(threshold=0.2, prompt_thresholds={"star": 0.05}, nms="box", nms_iou=0.4, max_detections=4)

Found = list[tuple[str, float, list[float], dict]]
"""(prompt, score, box xyxy, RLE), by prompt and falling score."""


class LocalBackend:
    """A `Backend` of one replica in this process."""

    def __init__(self, replica: ModelReplica) -> None:
        self.segment, self.label, self.keep_image = replica.segment, replica.label, replica.keep_image
        self.list_adapters, self.ready = replica.list_adapters, replica.ready
        self.named_metrics = replica.named_metrics

    async def metrics(self) -> dict[str, str]:
        return dict([await self.named_metrics()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """adapters/parts with recorded post-processing, images/, and data/valid, all with one image."""
    folder = tmp_path_factory.mktemp("everywhere")
    shutil.copytree(ROOT / "serve_app" / "samples" / "parts", folder / "adapters" / "parts")
    record_post_processing(folder / "adapters" / "parts", RECORDED)
    for name in ("images", "data/valid"):
        (folder / name).mkdir(parents=True)
        shutil.copy(SAMPLE, folder / name / "sample.jpg")
    width, height = Image.open(SAMPLE).size
    annotations = [
        {"id": id_, "image_id": 1, "category_id": id_, "bbox": [5, 5, 9, 9], "area": 81, "iscrowd": 0}
        | {"segmentation": [[5, 5, 14, 5, 14, 14, 5, 14]]}
        for id_ in (1, 2)
    ]
    content = {
        "images": [{"id": 1, "file_name": "sample.jpg", "width": width, "height": height}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": PROMPTS[0]}, {"id": 2, "name": PROMPTS[1]}],
    }
    (folder / "data/valid" / ANNOTATION_FILE).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def service(folder) -> Iterator[str]:
    """The address of the service's HTTP side over one replica, in this process."""
    settings = ServeSettings(model="tiny", adapters=AdapterSettings(root=folder / "adapters"))
    ready = threading.Event()
    started: dict[str, Any] = {}

    def run() -> None:
        import asyncio

        async def serve() -> None:
            replica = ModelReplica(settings)
            app = create_api(settings, LocalBackend(replica))
            server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
            started["server"] = server
            task = asyncio.create_task(server.serve())
            while not server.started and not task.done():
                await asyncio.sleep(0.01)
            if server.started:
                started["port"] = server.servers[0].sockets[0].getsockname()[1]
            ready.set()
            await task
            await replica.close()

        asyncio.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(120)
    yield f"http://127.0.0.1:{started['port']}"
    started["server"].should_exit = True
    thread.join(30)


def of_predictor(folder: Path, adapter: str | None, _service: str) -> Found:
    results = Predictor("tiny", adapter=adapter and folder / "adapters" / adapter, device="cpu").predict(
        SAMPLE, PROMPTS
    )
    return [
        (result.prompt, *one)
        for result in results
        for one in zip(result.scores.tolist(), result.boxes_xyxy.tolist(), result.rles, strict=True)
    ]


def of_infer(folder: Path, adapter: str | None, _service: str) -> Found:
    file = folder / f"infer {adapter}.json"
    arguments = ["infer", "--model", "tiny", "--image", str(SAMPLE), "--prompt", *PROMPTS, "--device", "cpu"]
    arguments += ["--output", str(folder / "picture.png"), "--json", str(file)]
    assert main(arguments + (["--weights", str(folder / "adapters" / adapter)] if adapter else [])) == 0
    (image,) = json.loads(file.read_text())["images"]
    return [
        (result["prompt"], one["score"], one["box_xyxy"], one["mask"])
        for result in image["results"]
        for one in result["detections"]
    ]


def of_coco(entries: list[dict[str, Any]]) -> Found:
    found = []
    for entry in sorted(entries, key=lambda one: (one["category_id"], -one["score"])):
        x, y, width, height = entry["bbox"]
        box = [x, y, x + width, y + height]
        found.append((PROMPTS[entry["category_id"] - 1], entry["score"], box, entry["segmentation"]))
    return found


def of_validate(folder: Path, adapter: str | None, _service: str) -> Found:
    output = folder / f"validate {adapter}"
    arguments = ["validate", "--val-data-dir", str(folder / "data"), "--device", "cpu", "--output", str(output)]
    arguments += ["--weights", str(folder / "adapters" / adapter)] if adapter else ["--use-base-model"]
    assert main(arguments) == 0
    # The file has no score cut, which mAP needs; the metrics say which thresholds count.
    settings = json.loads((output / "metrics.json").read_text())["settings"]
    post = PostProcessing(**{name: settings[name] for name in PostProcessing.model_fields})
    found = of_coco(json.loads((output / "predictions.json").read_text()))
    return [one for one in found if one[1] >= post.threshold_of(one[0])]


def of_batch_job(folder: Path, adapter: str | None, _service: str) -> Found:
    output = folder / f"labels {adapter}"
    words = ["jobs/predict.py", "--model", "tiny", "--input", str(folder / "images"), "--prompt", *PROMPTS]
    words += ["--output", str(output), "--device", "cpu", "--num-workers", "1"]
    words += ["--weights", str(folder / "adapters" / adapter)] if adapter else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:  # no process of its own, whose imports would take long
            predict.run()
    assert ended.value.code == 0
    return of_coco(json.loads((output / "predictions.json").read_text()))


def of_http(_folder: Path, adapter: str | None, service: str) -> Found:
    request = {"image_base64": base64.b64encode(SAMPLE.read_bytes()).decode(), "prompts": PROMPTS, "adapter": adapter}
    response = httpx.post(f"{service}/v1/segment", json=request, timeout=60)
    assert response.status_code == 200, response.text
    return [
        (result["prompt"], one["score"], one["box_xyxy"], one["mask"])
        for result in response.json()["results"]
        for one in result["detections"]
    ]


def of_client(_folder: Path, adapter: str | None, service: str) -> Found:
    with Client(service) as client:
        results = client.segment(SAMPLE, PROMPTS, adapter=adapter)
    found = []
    for result in results:
        for score, box, mask in zip(result.scores.tolist(), result.boxes_xyxy.tolist(), result.masks, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            found.append((result.prompt, score, box, rle))
    return found


BATCH_OF_THE_BASE = pytest.param(of_batch_job, None, marks=pytest.mark.slow)  # starts Ray once more


@pytest.mark.parametrize(
    ("way", "adapter"),
    [
        *((way, "parts") for way in (of_validate, of_infer, of_batch_job, of_http, of_client)),
        *((way, None) for way in (of_validate, of_infer, of_http, of_client)),
        BATCH_OF_THE_BASE,
    ],
)
def test_every_way_finds_what_the_predictor_finds(way, adapter, folder, service):
    expected, found = of_predictor(folder, adapter, service), way(folder, adapter, service)
    assert [one[0] for one in found] == [one[0] for one in expected]
    assert len(expected) >= 2
    np.testing.assert_allclose([one[1] for one in found], [one[1] for one in expected], atol=1e-5)
    np.testing.assert_allclose([one[2] for one in found], [one[2] for one in expected], atol=0.02)
    for one, other in zip(found, expected, strict=True):
        # a logit next to 0 may round to either side
        assert (coco_mask.decode(one[3]) != coco_mask.decode(other[3])).mean() < 1e-4


def test_the_recorded_settings_matter(folder):
    def found(**changes: Any) -> list[int]:
        predictor = Predictor("tiny", adapter=folder / "adapters" / "parts", device="cpu", **changes)
        return [len(result) for result in predictor.predict(SAMPLE, PROMPTS)]

    recorded = found()
    assert recorded == found(nms="box", nms_iou=0.4, max_detections=4)
    assert found(threshold=0.5) != recorded
    assert found(max_detections=1) == [1, 1] != recorded
