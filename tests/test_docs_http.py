"""The HTTP examples of the pages: curl sends what they show to the real routes, and example answers have their form."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient

from sam3lora.engine.features import COUNTED
from serve_app.http.dense_schemas import DenseResponse
from serve_app.http.errors import STATUS_OF, ServeError
from serve_app.http.ingress import create_api
from serve_app.http.refine_schemas import RefineResponse
from serve_app.http.schemas import AdaptersResponse, ErrorResponse, ImageResponse, SegmentResponse
from serve_app.messages import SegmentCall, SegmentReply
from serve_app.metrics import ReplicaMetrics
from serve_app.settings import AdapterSettings, Batching, Caches, Limits, ServeSettings

from .serve_app.http_cases import FakeBackend, found
from .test_docs import PAGES, ROOT

URL = "http://127.0.0.1:8000"
SAMPLES = ROOT / "serve_app" / "samples"
API_PAGE = (ROOT / "docs" / "http_api.md").read_text()
SERVING_PAGE = (ROOT / "docs" / "serving.md").read_text()
ANSWERS = (SegmentResponse, DenseResponse, RefineResponse, ImageResponse, AdaptersResponse, ErrorResponse)
STRICT_CURL = 'set -o pipefail; curl() { command curl -sS --fail-with-body --max-time 20 --noproxy "*" "$@"; }\n'


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The routes of a service with its sample adapters and default limits, and no model behind them."""
    backend = FakeBackend()

    def answer(call: SegmentCall) -> SegmentReply | ServeError:
        if call.adapter is not None and not (SAMPLES / call.adapter).is_dir():
            return ServeError("adapter_not_found", f"{call.adapter} is no sample")
        if call.image.data is None and call.image.key not in {image.key for image in backend.kept}:
            return ServeError("image_not_found", "upload it before")
        return SegmentReply((48, 64), [found(prompt, masks=call.masks) for prompt in call.prompts or ("visual",)], {})

    backend.answer = answer
    api = create_api(ServeSettings(api_keys_variable="SAM3LORA_TEST_KEYS"), backend)
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)


def curl_commands(page: Path) -> list[str]:
    """Commands of indented code, as a reader copies them: with their line breaks."""
    shown = re.findall(r"^ {4}((?:.*\\\n)*.*)", page.read_text(), re.MULTILINE)
    return [command for command in shown if re.search(r"(^|\| *)curl ", command)]


def run(command: str, url: str) -> subprocess.CompletedProcess[str]:
    text = STRICT_CURL + command.replace(URL, url)
    return subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", [page for page in PAGES if curl_commands(page)], ids=lambda page: page.name)
def test_curl_examples_are_answered(page: Path, url: str):
    faults = []
    for command in curl_commands(page):
        assert URL in command, f"{command}: expected {URL}"
        done = run(command, url)
        if done.returncode != 0:
            faults.append(f"{command}: {done.stdout}{done.stderr}")
    assert not faults, "\n".join(faults)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_wrong_curl_examples_are_seen(url: str):
    broken_line = f"curl -H 'Content-Type: application/json' {URL}/v1/segment -d '{{\"prompts\": [\"gear\"], \\\n}}'"
    wrong_field = f'curl -F image=@serve_app/static/sample.jpg -F \'request={{"prompt": ["gear"]}}\' {URL}/v1/segment'
    wrong_path = f"curl {URL}/v1/adaptors"
    for command, complaint in ((wrong_field, "prompts"), (wrong_path, "no such path"), (broken_line, "malformed_body")):
        done = run(command, url)
        assert done.returncode != 0
        assert complaint in done.stdout


def test_the_page_has_examples_of_every_route():
    shown = "\n".join(curl_commands(ROOT / "docs" / "http_api.md"))
    assert all(f"{URL}/v1/{route}" in shown for route in ("segment", "dense", "refine", "images", "adapters"))


def test_example_answers_have_their_form():
    # A field that is unknown or gone would not come back.
    blocks = [json.loads(block) for block in re.findall(r"^```json$(.*?)^```$", API_PAGE, re.MULTILINE | re.DOTALL)]
    forms = []
    for block in blocks:
        form = next(form for form in ANSWERS if set(form.model_fields) == set(block))
        assert form.model_validate(block).model_dump(exclude_unset=True) == block
        forms.append(form)
    assert set(forms) == set(ANSWERS)


def test_every_error_is_listed_with_its_status():
    rows = re.findall(r"^\| (\d{3}) \| ([^|]+) \|", API_PAGE, re.MULTILINE)
    listed = {type: int(status) for status, types in rows for type in re.findall(r"`(\w+)`", types)}
    assert listed == STATUS_OF


def test_every_setting_is_listed_with_its_default():
    named = set(re.findall(r"`([\w.]+)`", SERVING_PAGE))
    parts = {"adapters": AdapterSettings, "batching": Batching, "caches": Caches}
    keys = {name for name in ServeSettings.model_fields if name not in parts} | set(Limits.model_fields)
    keys |= {f"{part}.{name}" for part, section in parts.items() for name in section.model_fields}
    assert keys - named == set()

    defaults = dict(re.findall(r"^\| `([\w.]+)` \| `?([\w.]+)`?(?: \(.+?\))? \|", SERVING_PAGE, re.MULTILINE))
    assert {"max_resident_adapters", "batching.max_rows", "timeout_s", "api_keys_variable"} <= set(defaults)
    settings = ServeSettings().model_dump(mode="json")
    for key, shown in defaults.items():
        value = settings
        for name in key.split(".") if key not in Limits.model_fields else ("limits", key):
            value = value[name]
        assert str(value).lower().removesuffix(".0") == shown.lower(), key


def test_every_metric_is_listed():
    api = create_api(ServeSettings(api_keys_variable="SAM3LORA_TEST_KEYS"), FakeBackend())
    own = TestClient(api).get("/metrics").text
    others = (
        "forwards",
        "rows",
        "images_labelled",
        "objects_clicked",
        "click_decodes",
        "image_cache_bytes",
        "image_cache_evictions",
    )
    counters = dict.fromkeys((*COUNTED, *others), 0)
    replica = ReplicaMetrics(lambda: counters, lambda: 0, lambda: 0).text()
    made = {line.split()[2] for line in (own + replica).splitlines() if line.startswith("# TYPE sam3lora_")}
    made = {name.removesuffix("_total") for name in made if not name.endswith("_created")}
    listed = {name.removesuffix("_total") for name in re.findall(r"`(sam3lora_\w+)`", SERVING_PAGE)}
    assert listed == made
