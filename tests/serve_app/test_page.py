"""The web page in a real browser: images, prompts, boxes, and what happens while it asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .browser import Browser, wait_until
from .page_server import PageServer
from .page_steps import BUSY, PAGE_MARKS, answered, ask, counts, on_screen

pytest_plugins = ["tests.serve_app.page_fixtures"]
pytestmark = PAGE_MARKS


@pytest.mark.parametrize(("event", "holder"), [("drop", "dataTransfer"), ("paste", "clipboardData")])
def test_images_are_dropped_and_pasted(page: Browser, event: str, holder: str):
    page.value(
        "fetch('/static/sample.jpg').then(response => response.blob()).then(blob => {"
        " const files = new DataTransfer(); files.items.add(new File([blob], 'given.jpg', {type: 'image/jpeg'}));"
        f" const kind = {{drop: DragEvent, paste: ClipboardEvent}}['{event}'];"
        f" document.body.dispatchEvent(new kind('{event}', {{{holder}: files, bubbles: true, cancelable: true}})); }})"
    )
    page.wait("!document.querySelector('#work').hidden")
    assert [page.text("#image-name"), page.text("#image-size")] == ["given.jpg", "640 × 640 px"]


def test_prompts_are_chips(page: Browser, server: PageServer, image: Path):
    ask(page, image, "gear, arrow", "gear", "  ")
    chips = "[...document.querySelectorAll('.chip-text')].map(chip => chip.textContent)"
    assert page.value(chips) == ["gear", "arrow"]
    page.type("#prompt-input", "bolt,")
    assert page.value(chips) == ["gear", "arrow", "bolt"]
    page.type("#prompt-input", "", key="Backspace")
    assert page.value(chips) == ["gear", "arrow"]
    page.click("[aria-label='Remove gear']")
    assert page.value(chips) == ["arrow"]
    wait_until(lambda: server.questions[-1]["prompts"] == ["arrow"], "the last question")
    page.click("[aria-label='Remove arrow']")
    page.wait("document.querySelector('#ask').disabled")
    page.wait("document.querySelector('[data-part=results]').hidden")


def test_a_prompt_is_never_markup(page: Browser, image: Path):
    ask(page, image, "<img src=x onerror=alert(1)>")
    assert page.value("document.querySelectorAll('main img').length") == 0
    assert page.text(".group-title") == "<img src=x onerror=alert(1)>"


def test_after_a_file_that_is_no_image_another_one_is_asked_for(
    page: Browser, server: PageServer, image: Path, tmp_path: Path
):
    """The image before is neither asked again nor lost."""
    ask(page, image, "gear")
    asked = len(server.questions)
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    page.choose_file("#file", path)
    page.wait("!document.querySelector('#error').hidden")
    assert "cannot read notes.txt as an image" in page.text("#error-message")
    page.call("Page.setInterceptFileChooserDialog", enabled=True)
    page.press_on("#error-act")
    page.call("Page.setInterceptFileChooserDialog", enabled=False)
    page.choose_file("#file", image)
    wait_until(lambda: server.num_uploads == 2, "the image that was chosen next")
    answered(page)
    assert page.value("document.querySelector('#error').hidden")
    assert [question["prompts"] for question in server.questions[asked:]] == [["gear"]]


def test_a_refused_prompt_is_marked_and_the_others_are_answered(page: Browser, server: PageServer, image: Path):
    long = "gear " * 39
    page.choose_file("#file", image)
    page.type("#prompt-input", f"gear, {long}, arrow", key="Enter")
    answered(page)
    assert server.questions[-1]["prompts"] == ["gear", "arrow"]
    assert page.value("[...document.querySelectorAll('.group-title')].map(title => title.textContent)") == [
        "gear",
        "arrow",
    ]
    assert page.value("document.querySelectorAll('.chip').length") == 3
    assert page.text(".is-bad .chip-fault") == "has more than 32 tokens: shorten it"
    assert page.value("document.querySelector('#error').hidden")
    colours = "[...document.querySelectorAll('{}')].map(mark => getComputedStyle(mark).getPropertyValue('--mark'))"
    chips = page.value(colours.format(".chip:not(.is-bad)"))
    assert page.value(colours.format(".count")) == chips  # answers keep the colours of their chips
    # It is not asked again with the next prompt, and goes with its chip.
    page.type("#prompt-input", "bolt", key="Enter")
    wait_until(lambda: server.questions[-1]["prompts"] == ["gear", "arrow", "bolt"], "the next question")
    page.click(".is-bad .chip-remove")
    answered(page)
    assert page.value("document.querySelector('.is-bad')") is None


def test_where_all_prompts_are_refused_nothing_old_is_shown(page: Browser, image: Path):
    ask(page, image, "gear")
    page.type("#prompt-input", "gear " * 39, key="Enter")
    page.wait("document.querySelector('.is-bad')")
    page.click("[aria-label='Remove gear']")
    page.wait("document.querySelector('[data-part=results]').hidden")
    assert counts(page) == [[]]


def test_an_answer_never_stands_beside_prompts_that_it_does_not_belong_to(
    page: Browser, server: PageServer, image: Path
):
    """While a slow prompt is waited for, and when the service fails."""
    ask(page, image, "gear", "arrow")
    page.click("[aria-label='Remove gear']")
    page.type("#prompt-input", "slow", key="Enter")
    wait_until(lambda: "slow" in server.questions[-1]["prompts"], "the slow question")
    assert page.value("[...document.querySelectorAll('.count')].map(count => count.textContent)") == ["arrow1", "slow…"]
    page.click("[aria-label='Remove slow']")
    page.type("#prompt-input", "broken", key="Enter")
    page.wait("!document.querySelector('#error').hidden")
    assert counts(page) == [[]]
    assert page.value("document.querySelector('[data-part=results]').hidden")


def test_no_more_prompts_can_be_entered_than_the_service_takes(page: Browser, server: PageServer, image: Path):
    page.choose_file("#file", image)
    page.type("#prompt-input", ", ".join(f"part {number}" for number in range(32)), key="Enter")
    answered(page)
    page.type("#prompt-input", "one too many", key="Enter")
    assert "At most 32 prompts" in page.text("#prompt-limit")
    assert page.value("document.querySelectorAll('.chip').length") == 32
    assert len(server.questions[-1]["prompts"]) == 32
    page.click("[aria-label='Remove part 3']")
    assert page.text("#prompt-limit") == ""


def test_boxes_are_drawn_with_the_mouse(page: Browser, server: PageServer, image: Path):
    page.choose_file("#file", image)
    page.wait("!document.querySelector('#work').hidden")
    page.click("input[value=negative]")
    page.drag(on_screen(page, 120, 90), on_screen(page, 40, 30))
    answered(page)
    question = server.questions[-1]
    assert question["prompts"] == []
    assert question["boxes"] == [{"xyxy": [40, 30, 120, 90], "label": 0}]
    page.click("[aria-label='Delete box 1, not like this']")
    page.wait("document.querySelector('[data-part=results]').hidden")


def test_boxes_are_drawn_with_the_keyboard(page: Browser, server: PageServer, image: Path):
    page.choose_file("#file", image)
    page.wait("!document.querySelector('#work').hidden")
    page.click("input[value=positive]")
    page.value("document.querySelector('canvas').focus()")
    page.press("Enter")  # the first corner: the middle
    for key in ("ArrowRight", "ArrowDown"):
        page.press(key, shift=True)
    page.press("ArrowRight")
    page.press("Enter")
    answered(page)
    # Steps of a twentieth and of a hundredth of 240 pixels.
    assert server.questions[-1]["boxes"] == [{"xyxy": [120, 90, 134, 102], "label": 1}]


def test_undo_takes_back_what_was_done_to_the_boxes(page: Browser, server: PageServer, image: Path):
    page.choose_file("#file", image)
    page.wait("!document.querySelector('#work').hidden")
    assert not page.value("document.querySelector('#undo').checkVisibility()")
    page.click("input[value=positive]")
    page.drag(on_screen(page, 40, 30), on_screen(page, 120, 90))
    page.drag(on_screen(page, 10, 10), on_screen(page, 60, 50))
    answered(page)
    boxes = "document.querySelectorAll('#box-list li').length"
    page.click("[aria-label='Delete box 1, like this']")
    assert page.value(boxes) == 1
    page.click("#undo")
    assert page.value(boxes) == 2
    page.press("z", ctrl=True)
    wait_until(lambda: [box["xyxy"] for box in server.questions[-1]["boxes"]] == [[40, 30, 120, 90]], "the first box")
    page.press("z", ctrl=True)
    assert page.value(boxes) == 0


def test_an_evicted_image_is_uploaded_again_and_a_busy_service_is_retried_with_a_note(
    page: Browser, server: PageServer, image: Path
):
    ask(page, image, "gear")
    server.forget_images()
    page.type("#prompt-input", "arrow", key="Enter")
    page.wait(f"!{BUSY} && document.querySelectorAll('.group').length === 2")
    assert server.num_uploads == 2
    assert page.value("document.querySelector('#error').hidden")
    page.value(
        "window.notes = []; new MutationObserver(() => notes.push(document.querySelector('#status').textContent))"
        ".observe(document.querySelector('#status'), {childList: true}); 0"
    )
    asked = len(server.questions)
    page.type("#prompt-input", "busy", key="Enter")
    page.wait(f"!{BUSY} && document.querySelectorAll('.group').length === 3")
    assert "The service is busy: trying again in 1 s." in page.value("notes")
    assert len(server.questions) == asked + 2


def test_an_error_is_shown_with_its_request_id(page: Browser, image: Path):
    page.choose_file("#file", image)
    page.type("#prompt-input", "broken", key="Enter")
    page.wait("!document.querySelector('#error').hidden")
    assert page.text("#error-message") == "something failed in the service"
    assert page.text("#error-request") == "Request req-42"
    assert not page.value(f"Boolean({BUSY})")
    page.type("#prompt-input", "", key="Backspace")
    page.type("#prompt-input", "gear", key="Enter")
    answered(page)
    assert page.value("document.querySelector('#error').hidden")


def test_a_new_request_cancels_the_running_one(page: Browser, server: PageServer, image: Path):
    page.choose_file("#file", image)
    page.type("#prompt-input", "slow", key="Enter")
    wait_until(lambda: bool(server.questions), "the slow question")
    page.type("#prompt-input", "", key="Backspace")
    page.type("#prompt-input", "gear", key="Enter")
    answered(page)
    wait_until(lambda: server.num_given_up == 1, "the slow question to be given up")
    assert page.text(".group-title") == "gear"


def test_a_long_upload_shows_its_progress_and_can_be_cancelled(page: Browser, server: PageServer, tmp_path: Path):
    path = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (600, 600, 3), dtype=np.uint8)).save(path)  # 1 MB
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1}
    page.call("Network.emulateNetworkConditions", uploadThroughput=60_000, **slow)
    page.choose_file("#file", path)
    page.type("#prompt-input", "gear", key="Enter")
    page.wait("document.querySelector('#upload').checkVisibility() && document.querySelector('#upload').value > 0")
    page.wait("document.querySelector('#cancel').checkVisibility({visibilityProperty: true})")
    page.click("#cancel")
    page.call("Network.emulateNetworkConditions", uploadThroughput=-1, **slow)
    page.wait(f"!{BUSY} && !document.querySelector('#upload').checkVisibility()")
    assert server.questions == []
    assert page.value("document.querySelector('#error').hidden")
    page.click("#ask")
    answered(page)
    assert len(server.questions) == 1
