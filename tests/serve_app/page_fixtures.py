"""The browser that all tests of the web page share, the page in it, and the stand-in for the service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .browser import Browser
from .page_server import PageServer
from .page_steps import SIZE_HW, open_page


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer().running() as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: PageServer) -> Iterator[Browser]:
    """The page with the adapters loaded; at the end nothing may have gone wrong unseen."""
    open_page(browser, server.url)
    yield browser
    assert browser.problems == []


@pytest.fixture
def phone(browser: Browser, server: PageServer) -> Iterator[Browser]:
    """The page on a touch screen, 390 pixels wide."""
    open_page(browser, server.url, width=390, height=844, dark=True)
    yield browser
    assert browser.problems == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)
    path = tmp_path / "road 7.png"
    Image.fromarray(pixels).save(path)
    return path
