"""A client that openapi-python-client generates from the API's description works against the service."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.settings import AdapterSettings, ServeSettings

from ..engine.engine_cases import write_adapter
from .http_cases import PNG, PNG_BASE64, SIZE_HW, make_client
from .local_service import local_service, served

pytest.importorskip("openapi_python_client")
ADAPTER = "towers"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the generated package, which can be imported."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(make_client().get("/openapi.json").text)
    (folder / "config.yml").write_text("post_hooks: []\n")
    name = "generated_segment_client"
    options = ["--path", "openapi.json", "--config", "config.yml", "--meta", "none", "--output-path", name]
    command = [sys.executable, "-m", "openapi_python_client", "generate", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield name
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def url(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / ADAPTER, spread_base, "vision", 1)
    settings = ServeSettings(
        model=str(spread_base), adapters=AdapterSettings(root=root), api_keys_variable="SAM3LORA_TEST_KEYS"
    )
    with served(local_service(settings)) as url:
        yield url


class GeneratedClient:
    """The generated package, its modules by name, and a client of it."""

    def __init__(self, name: str, url: str) -> None:
        self._name = name
        self.models = importlib.import_module(f"{name}.models")
        self.types = importlib.import_module(f"{name}.types")
        self.client = importlib.import_module(f"{name}.client").Client(base_url=url)

    def call(self, route: str, **arguments: Any) -> Any:
        module = importlib.import_module(f"{self._name}.api.default.{route}")
        answer = module.sync_detailed(client=self.client, **arguments)
        assert answer.status_code == 200, answer.content
        return answer.parsed

    def picture(self) -> Any:
        return self.types.File(payload=io.BytesIO(PNG), file_name="a.png", mime_type="image/png")


@pytest.fixture(scope="module")
def service(generated: str, url: str) -> GeneratedClient:
    return GeneratedClient(generated, url)


def test_segment_in_every_form(service: GeneratedClient):
    """The defaults of the description are sent wherever the client knows them."""
    ask = {"prompts": ["crack", "hole"], "threshold": 0.0, "max_detections": 2}
    models = service.models
    as_json = service.call("segment", body=models.SegmentRequest(image_base64=PNG_BASE64, **ask))
    in_form = service.call(
        "segment", body=models.SegmentFilesBody(image=service.picture(), request=models.SegmentRequest(**ask))
    )
    raw = service.call("segment", body=service.picture(), **ask)
    for answer in (as_json, in_form, raw):
        assert (answer.image.height, answer.image.width) == SIZE_HW
        assert [result.prompt for result in answer.results] == ["crack", "hole"]
        assert answer.results[0].num_detections > 0
        assert [result.to_dict() for result in answer.results] == [result.to_dict() for result in as_json.results]


def test_an_uploaded_image_boxes_and_every_form_of_masks(service: GeneratedClient):
    models = service.models
    kept = service.call("images", body=models.ImagesFilesBody(image=service.picture()))
    assert kept.image_id == service.call("images", body=models.ImageUpload(image_base64=PNG_BASE64)).image_id
    box = models.Box(xyxy=[4.0, 4.0, 40.0, 30.0])
    for masks in models.SegmentRequestMasks:
        request = models.SegmentRequest(image_id=kept.image_id, boxes=[box], threshold=0.0, masks=masks)
        (result,) = service.call("segment", body=request).results
        assert result.num_detections == len(result.detections) > 0


def test_the_recorded_settings_of_an_adapter_can_be_sent_back(service: GeneratedClient):
    """Also `merge_iou`, which has no effect without `merge`: it is what the service itself shows."""
    (adapter,) = service.call("adapters").adapters
    assert adapter.id == ADAPTER
    recorded = adapter.post_processing.to_dict()
    del recorded["prompt_thresholds"]
    request = service.models.SegmentRequest.from_dict({"prompts": ["crack"], "adapter": ADAPTER, **recorded})
    request.image_base64 = PNG_BASE64
    assert service.call("segment", body=request).adapter == ADAPTER


def test_health_and_metrics(service: GeneratedClient):
    assert service.call("healthz").status == "ok"
    assert service.call("readyz").status == "ready"
    assert "sam3lora_requests_total" in service.call("metrics")


def test_errors_are_parsed(service: GeneratedClient, generated: str):
    segment = importlib.import_module(f"{generated}.api.default.segment")
    request = service.models.SegmentRequest(prompts=["a", " "], image_base64=PNG_BASE64)
    answer = segment.sync_detailed(client=service.client, body=request)
    assert (answer.status_code, answer.parsed.error.type_) == (422, "invalid_prompt")
    assert json.loads(answer.content)["error"]["field"] == answer.parsed.error.field == "prompts[1]"
