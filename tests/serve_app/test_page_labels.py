"""The page of dense adapters, on the real routes: the picture in the colours of its labels, and the legend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from serve_app.http.ingress import create_api
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import EVERY_ADAPTER, AdapterPage, AdapterQuery, DenseCall, DenseReply
from serve_app.settings import ServeSettings

from .browser import Browser
from .http_cases import SIZE_HW, FakeBackend, labels_of, page_of
from .page_server import serving
from .page_steps import PAGE_MARKS

pytest_plugins = ["tests.serve_app.page_fixtures"]
pytestmark = PAGE_MARKS
RED = [128, 0, 0]  # value 1 of the palette


class DenseBackend(FakeBackend):
    """Two dense adapters, of which the second has masks instead of labels, and a broken one."""

    async def list_adapters(self, query: AdapterQuery = EVERY_ADAPTER) -> AdapterPage:
        self.listed.append(query)
        return page_of(
            AdapterResponse(id="land-cover", task="dense", classes=["background", "water"]),
            AdapterResponse(id="overlapping", task="dense", classes=["water", "background"]),
            AdapterResponse(id="torn", error="lacks its head"),
        )

    async def label(self, call: DenseCall) -> DenseReply:
        self.labelled.append(call)
        output = "label_png" if call.adapter == "land-cover" else "rle"
        return labels_of(DenseCall(call.image, call.adapter, output))


@pytest.fixture
def backend() -> DenseBackend:
    return DenseBackend()


@pytest.fixture
def page(browser: Browser, backend: DenseBackend) -> Iterator[Browser]:
    with serving(create_api(ServeSettings(), backend)) as url:
        browser.forget()
        browser.open(f"{url}labels")
        browser.wait("document.querySelectorAll('#adapter option').length === 2")
        yield browser
        assert browser.problems == []


@pytest.fixture
def white(tmp_path: Path) -> Path:
    path = tmp_path / "white.png"
    Image.new("RGB", SIZE_HW[::-1], "white").save(path)
    return path


def pixel(page: Browser, x: int, y: int) -> list[int]:
    copy = "new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true })"
    drawn = f"copy.drawImage(document.querySelector('#labels'), {-x}, {-y})"
    return page.value(f"(() => {{ const copy = {copy}; {drawn}; return [...copy.getImageData(0, 0, 1, 1).data]; }})()")[
        :3
    ]


def legend(page: Browser) -> list[str]:
    return page.value("[...document.querySelectorAll('#legend li')].map(e => e.innerText.replace(/\\s+/g, ' '))")


def test_the_labels_are_laid_over_the_picture(page: Browser, backend: DenseBackend, white: Path):
    assert backend.listed[-1].task == "dense"
    page.choose_file("#file", white)
    page.wait("document.querySelectorAll('#legend li').length === 2")
    assert legend(page) == ["background 75.0 %", "water 25.0 %"]
    page.set_range("#fill", 1)
    assert pixel(page, 30, 5) == RED  # the upper rows are water
    assert pixel(page, 30, 40) == [255, 255, 255]
    page.set_range("#fill", 0)
    assert pixel(page, 30, 5) == [255, 255, 255]
    assert [call.adapter for call in backend.labelled] == ["land-cover"]


def test_masks_of_classes_that_may_overlap(page: Browser, backend: DenseBackend, white: Path):
    page.value("document.querySelector('#adapter').value = 'overlapping'")
    page.choose_file("#file", white)
    page.wait("document.querySelectorAll('#legend li').length === 2")
    page.set_range("#fill", 1)
    assert pixel(page, 30, 5) == RED
    assert pixel(page, 30, 40) == [0, 128, 0]
    assert [call.image.data for call in backend.labelled] == [None]  # it was uploaded


def test_a_file_that_is_no_image(page: Browser, tmp_path: Path):
    (tmp_path / "a.png").write_text("no image")
    page.choose_file("#file", tmp_path / "a.png")
    page.wait("document.querySelector('#fault').textContent.includes('a.png')")
