"""The web page in a real browser: by keyboard, by screen reader and on a phone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .browser import Browser
from .page_server import PageServer
from .page_steps import PAGE_MARKS, answered, ask, counts, has_focus, on_screen, open_page, pick

pytest_plugins = ["tests.serve_app.page_fixtures"]
pytestmark = PAGE_MARKS


def test_every_control_has_a_name(page: Browser, image: Path):
    """Before an image, with two adapters and boxes, with each popover open, and in the documentation."""
    states = [page.names()]
    ask(page, image, "gear")
    pick(page, "compare", "shapes")
    answered(page, panels=2)
    page.click("input[value=positive]")
    page.drag(on_screen(page, 10, 10), on_screen(page, 30, 30))
    answered(page, panels=2)
    states.append(page.names())
    for box in ("key-box", "curl-box", "help"):
        page.value(f"document.querySelector('#{box}').showPopover()")
        states.append(page.names())
        page.value(f"document.querySelector('#{box}').hidePopover()")
    sizes = [len(state) for state in states]
    assert sizes[1] > sizes[0] > 5
    assert [entry for state in states for entry in state if not entry[1].strip()] == []
    assert {("slider", "Threshold"), ("slider", "Overlap allowed"), ("slider", "Fill")} <= set(states[1])
    assert {("combobox", "Adapter"), ("combobox", "Compare with"), ("combobox", "Drop overlapping")} <= set(states[1])


def test_the_focus_is_never_lost(page: Browser, image: Path):
    """Where what was pressed goes away, the focus goes to what is next."""
    lost = "body "

    def press(selector: str) -> str:
        page.value(f"document.querySelector({json.dumps(selector)}).focus()")
        assert has_focus(page) != lost, selector
        page.press("Enter")
        return has_focus(page)

    page.press("Tab")
    assert page.value("document.activeElement.className") == "skip"
    press("#sample-first")
    answered(page)
    assert "canvas" in has_focus(page)
    pick(page, "adapter", "shapes")
    answered(page)
    assert press("[aria-label='Remove gear']") == "button Remove arrow"
    assert press("[aria-label='Add gear']") == "button Remove gear"  # it was the last suggestion
    answered(page)
    assert press(".row") != lost
    page.click("input[value=positive]")
    page.drag(on_screen(page, 100, 80), on_screen(page, 140, 100))
    assert "canvas" in press("[aria-label='Delete box 1, like this']")
    assert press("#undo") == "button undo"
    assert "canvas" in press("#undo")
    page.set_range("#threshold", 0.3)
    assert press("#recorded") == "input threshold"
    page.type("#prompt-input", "broken", key="Enter")
    page.wait("!document.querySelector('#error').hidden")
    assert "canvas" in press("#error-close")
    page.click("[aria-label='Remove broken']")
    pick(page, "adapter", "")
    page.type("#prompt-input", "pothole", key="Enter")
    page.wait("document.querySelector('[data-part=offer]').checkVisibility()")
    assert "canvas" in press("[data-part=pick]")


def test_popovers_close_by_escape_and_by_a_click_outside_and_give_the_focus_back(page: Browser, image: Path):
    ask(page, image, "gear")
    for opener, box in ((".tip", "#help"), ("[data-part=curl]", "#curl-box")):
        is_open = f"document.querySelector('{box}').matches(':popover-open')"
        page.value(f"document.querySelector('{opener}').focus()")
        page.press("Enter")
        page.wait(is_open)
        page.press("Escape")
        page.wait(f"!{is_open}")
        assert page.value(f"document.activeElement.matches('{opener}')")
        page.press_on(opener)
        page.wait(is_open)
        page.drag((5, 5), (5, 5))
        page.wait(f"!{is_open}")


def test_from_the_sample_to_a_download_on_a_phone_in_two_taps(phone: Browser, server: PageServer):
    visible = (
        "[...document.querySelectorAll('canvas, [data-part=json]')].map(e => e.getBoundingClientRect())"
        ".every(({top, bottom}) => top >= 0 && bottom <= innerHeight)"
    )
    phone.press_on("#sample-first")
    answered(phone)
    assert counts(phone) == [[2, 2, 2]]
    phone.wait(visible)  # it scrolls there by itself
    phone.press_on("[data-part=json]")
    assert phone.downloaded("sample_shapes.json").stat().st_size > 0
    assert phone.text("#image-name") == "sample.jpg"
    assert phone.value("document.documentElement.scrollWidth") == 390
    assert phone.failed_loads == []


def test_a_phone_shows_no_hints_for_mouse_and_keyboard_and_a_desk_none_for_touch(
    browser: Browser, server: PageServer, image: Path
):
    for width, with_mouse in ((390, False), (1280, True)):
        open_page(browser, server.url, width=width, height=844)
        browser.choose_file("#file", image)
        browser.wait("!document.querySelector('#work').hidden")
        browser.click("input[value=positive]")
        seen = "document.querySelector('#box-help .with-{}').checkVisibility()"
        assert browser.value(seen.format("mouse")) is with_mouse
        assert browser.value(seen.format("touch")) is not with_mouse


def test_after_segment_the_picture_is_in_view_on_a_phone(phone: Browser, image: Path):
    phone.choose_file("#file", image)
    phone.wait("!document.querySelector('#work').hidden")
    phone.type("#prompt-input", "gear")  # as typed, without Enter
    phone.press_on("#ask")
    answered(phone)
    frame = "document.querySelector('canvas').getBoundingClientRect()"
    phone.wait(f"{frame}.top >= 0 && {frame}.bottom <= innerHeight")
    assert not phone.value("document.querySelector('#ask').checkVisibility()")
    assert phone.text("#status") == "Updates by itself."


def test_an_error_is_in_view_on_a_phone(phone: Browser, image: Path):
    ask(phone, image, "gear")
    phone.value("scrollTo(0, document.body.scrollHeight)")
    phone.type("#prompt-input", "broken", key="Enter")
    phone.wait("!document.querySelector('#error').hidden")
    box = phone.value("(({top, bottom}) => [top, bottom])(document.querySelector('#error').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 844
    on_top = "document.elementFromPoint(200, document.querySelector('#error-message').getBoundingClientRect().top + 5)"
    assert phone.value(f"{on_top}.closest('#error') !== null")


@pytest.mark.parametrize("width", [390, 1280])
def test_a_key_is_asked_for_only_where_the_service_has_keys_and_stays_in_the_tab(browser: Browser, width: int):
    shown = "document.querySelector('#key-open').checkVisibility()"
    with PageServer().running() as server:
        open_page(browser, server.url, width=width, height=844)
        assert not browser.value(shown)
    with PageServer(api_key="secret").running() as server:
        browser.forget()
        browser.open(server.url, width=width, height=844)
        browser.wait("document.querySelector('#key-box').matches(':popover-open')")
        assert browser.text("#key-message") == "This service asks for an API key."
        browser.type("#key", "wrong", key="Enter")
        browser.wait("document.querySelector('#key-message').checkVisibility()")
        browser.wait("document.querySelector('#key-message').innerText === 'That key is not accepted.'")
        browser.press("Escape")
        assert browser.text("#error-message") == "That key is not accepted."
        browser.press_on("#error-act")
        browser.call("Input.insertText", text="secret")
        browser.press("Enter")
        browser.wait("document.querySelector('#threshold-value').textContent")
        assert browser.value("document.querySelector('#error').hidden")
        kept = browser.value("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [["secret"], [], ""]
        browser.value("sessionStorage.clear()")
        assert browser.problems == []
