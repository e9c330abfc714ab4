"""Steps that a person takes on the web page, and what is to be seen then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .browser import Browser, find_chromium

PAGE_MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed"),
]
BUSY = "document.querySelector('.is-busy')"
SIZE_HW = (180, 240)  # of the image


def open_page(browser: Browser, url: str, **window: int | bool) -> None:
    browser.forget()
    browser.open(url, **window)
    browser.wait("document.querySelector('#threshold-value').textContent")


def ask(page: Browser, image: Path, *prompts: str) -> None:
    page.choose_file("#file", image)
    for prompt in prompts:
        page.type("#prompt-input", prompt, key="Enter")
    answered(page)


def answered(page: Browser, panels: int = 1) -> None:
    shown = "document.querySelectorAll('[data-part=results]:not([hidden])').length"
    page.wait(f"{shown} === {panels} && !{BUSY} && document.querySelectorAll('.group').length > 0")


def pick(page: Browser, field: str, choice: str) -> None:
    """Open the list of a field (`adapter`, `compare`) and click on a choice."""
    page.click(f"#{field}")
    page.value(f"document.querySelector('#{field}').focus()")
    option = f"#{field}-list [data-value={json.dumps(choice)}]"
    page.wait(f"document.querySelector({json.dumps(option)})?.checkVisibility()")
    page.click(option)


def options(page: Browser, field: str) -> list[str]:
    """The texts of an open list."""
    return page.value(f"[...document.querySelectorAll('#{field}-list [role=option] b')].map(text => text.textContent)")


def on_screen(page: Browser, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image is in the window, while the image is shown whole."""
    frame = page.rectangle("canvas")
    scale = min(frame["width"] / SIZE_HW[1], frame["height"] / SIZE_HW[0])
    left = frame["x"] + (frame["width"] - SIZE_HW[1] * scale) / 2
    top = frame["y"] + (frame["height"] - SIZE_HW[0] * scale) / 2
    return left + x * scale, top + y * scale


def counts(page: Browser) -> list[list[int]]:
    """Detections of each prompt, panel by panel."""
    return page.value(
        "[...document.querySelectorAll('.panel')].map(panel =>"
        " [...panel.querySelectorAll('.count strong')].map(count => Number(count.textContent)))"
    )


def has_focus(page: Browser) -> str:
    """The element with the focus, in short."""
    short = "({localName, id, ariaLabel}) => [localName, id || ariaLabel || ''].join(' ')"
    return page.value(f"({short})(document.activeElement)")
