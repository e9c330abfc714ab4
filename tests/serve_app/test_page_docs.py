"""The page of the HTTP API, and the commands that the pages give, on the real routes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.http.dense_schemas import DenseRequest
from serve_app.http.ingress import create_api
from serve_app.http.refine_schemas import RefineRequest
from serve_app.http.schemas import SegmentRequest
from serve_app.settings import ServeSettings

from .browser import Browser
from .http_cases import PNG, FakeBackend
from .page_server import STATIC, serving
from .page_steps import PAGE_MARKS, ask, open_page

pytest_plugins = ["tests.serve_app.page_fixtures"]
pytestmark = PAGE_MARKS


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The real routes, with no model behind them."""
    with serving(create_api(ServeSettings(), FakeBackend())) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where commands run: with the sample that the first of them downloads."""
    shutil.copy(STATIC / "sample.jpg", tmp_path)
    return tmp_path


@pytest.fixture(params=[1280, 390])
def docs(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Browser]:
    browser.forget()
    browser.open(f"{url}docs", width=request.param)
    browser.wait("document.querySelector('#metrics')")
    yield browser
    assert browser.problems == []


def run(command: str, folder: Path) -> str:
    settings = 'set -e -o pipefail; curl() { command curl -sS --fail-with-body --max-time 20 --noproxy "*" "$@"; }\n'
    ended = subprocess.run(["bash", "-c", settings + command], cwd=folder, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
    return ended.stdout


def test_commands_of_the_documentation_run_as_they_are(docs: Browser, folder: Path):
    commands = docs.value("[...document.querySelectorAll('.command + pre')].map(pre => pre.textContent)")
    answers = [run(command, folder) for command in commands]
    segmented = [json.loads(answer) for answer in answers if '"results"' in answer]
    assert [[result["prompt"] for result in answer["results"]] for answer in segmented] == [["gear", "arrow"]] * 3
    labelled = [json.loads(answer) for answer in answers if '"label_png"' in answer]
    assert [answer["adapter"] for answer in labelled] == ["land-cover"] * 3
    assert sum('"alternatives"' in answer for answer in answers) == 2
    assert sum('"image_id"' in answer for answer in answers) == 2
    assert sum('"adapters"' in answer for answer in answers) == 1


def test_a_file_is_tried_in_the_documentation(docs: Browser, folder: Path):
    picture = folder / "mine.png"
    picture.write_bytes(PNG)
    docs.value("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert not docs.value("document.querySelector('#segment .try pre').checkVisibility()")
    docs.choose_file("#segment input[type=file]", picture)
    docs.click("#segment .try button")
    docs.wait("document.querySelector('#segment .try pre').checkVisibility()")
    assert docs.text("#segment .try [role=status]").startswith("200")
    answer = json.loads(docs.text("#segment .try pre"))
    assert answer["image"] == {"width": 64, "height": 48}
    docs.click("#images .try button")  # without a file: the sample
    docs.wait("document.querySelector('#images .try pre').textContent.includes('image_id')")


def test_the_documentation_is_readable(docs: Browser):
    """No markup shows through, nothing is cut off, every control has a name, and every field is there."""
    docs.value("document.querySelectorAll('details').forEach(details => details.open = true)")
    text = docs.value("document.querySelector('main').innerText")
    assert "`" not in text
    assert ".;" not in text
    width = docs.value("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    assert [entry for entry in docs.names() if not entry[1].strip()] == []
    for route, model in (("segment", SegmentRequest), ("dense", DenseRequest), ("refine", RefineRequest)):
        for field in model.model_fields:
            shown = f"[...document.querySelectorAll('#{route} td code')].some(e => e.textContent === '{field}')"
            assert docs.value(shown), field
    accent = "getComputedStyle(document.documentElement).getPropertyValue('--accent')"
    mine = docs.value(accent)
    docs.value("document.querySelector('.top h1 a').click()")
    docs.wait("document.querySelector('#panels') && document.readyState === 'complete'")
    assert docs.value(accent) == mine


def test_the_command_of_the_page_gives_what_the_page_shows(browser: Browser, url: str, tmp_path: Path):
    """With quotes in a prompt and in the file's name, and a threshold of one's own."""
    picture = tmp_path / "line 3's; part.png"
    picture.write_bytes(PNG)
    open_page(browser, url)
    ask(browser, picture, "gear", 'bob\'s "bolt"')
    browser.set_range("#threshold", 0.7)
    browser.click("[data-part=json]")
    shown = json.loads(browser.downloaded("line 3's; part_base.json").read_text())
    browser.click("[data-part=curl]")
    answer = json.loads(run(browser.text("#curl-text"), tmp_path))
    names = ["gear", 'bob\'s "bolt"']
    assert [result["prompt"] for result in answer["results"]] == names
    assert [result["prompt"] for result in shown["results"]] == names
    assert '"threshold":0.7' in browser.text("#curl-text")
    assert browser.problems == []
