"""Clicks on the web page in a real browser: outlines corrected and added, the way back, and the downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pycocotools import mask as coco_mask

from .browser import Browser, wait_until
from .page_server import PageServer
from .page_steps import PAGE_MARKS, answered, ask, counts, has_focus, on_screen, open_page, options, pick

pytest_plugins = ["tests.serve_app.page_fixtures"]
pytestmark = PAGE_MARKS
GEAR_XYXY = [9, 9, 81, 81]  # of the detection of 0.9


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer(clicks=True).running() as server:
        yield server


def begin(page: Browser, image: Path, *prompts: str) -> None:
    ask(page, image, *(prompts or ("gear",)))
    page.click("[name=tool][value=click]")
    page.value("document.querySelector('canvas').scrollIntoView({block: 'center'})")


def click(page: Browser, x: float, y: float, *, alt: bool = False) -> None:
    """On a pixel of the image."""
    place = on_screen(page, x + 0.5, y + 0.5)
    page.drag(place, place, alt=alt)


def refined(page: Browser, server: PageServer, number: int) -> dict:
    """The object of the last request, when that many were answered."""
    wait_until(lambda: len(server.refined) == number, f"{number} requests")
    page.wait("!document.querySelector('.is-busy')")
    return server.refined[-1]["objects"][0]


def state(page: Browser) -> str:
    return page.text("#click-state")


def shown(page: Browser) -> list[str]:
    """The names of the entries of the list."""
    return page.value("[...document.querySelectorAll('.row')].map(row => row.ariaLabel)")


def coco(page: Browser, name: str = "road 7_base.coco.json") -> list[dict]:
    (page.downloads / name).unlink(missing_ok=True)
    page.click("[data-part=coco]")
    return json.loads(page.downloaded(name).read_text())["annotations"]


def test_a_found_outline_is_corrected_and_downloaded(page: Browser, server: PageServer, image: Path):
    begin(page, image, "gear", "nothing")
    assert server.questions[0]["keep_masks"] is True
    click(page, 30, 30)  # takes the outline in hand; nothing is asked without a click that changes it
    assert "Correcting gear" in state(page)
    assert server.refined == []

    click(page, 70, 60, alt=True)
    asked = refined(page, server, 1)
    assert asked["clicks"] == [{"x": 70, "y": 60, "label": 0}]
    assert (asked["box"], asked["mask"].keys()) == (GEAR_XYXY, {"mask_id"})
    assert server.refined[0]["adapter"] is None
    wait_until(lambda: "0.85" in state(page), "the score of the corrected outline")

    click(page, 20, 20)
    again = refined(page, server, 2)
    assert again["clicks"] == [{"x": 70, "y": 60, "label": 0}, {"x": 20, "y": 20, "label": 1}]
    assert again["mask"] != asked["mask"]

    assert counts(page) == [[1, 0]]
    assert "by hand" in shown(page)[0]
    page.set_range("#threshold", 0.95)  # what a person made stays
    assert counts(page) == [[1, 0]]
    (annotation,) = coco(page)
    assert (annotation["corrected"], annotation["score"], annotation["category_id"]) == (True, 0.85, 1)
    assert annotation["bbox"] == [9, 9, 61, 72]
    assert coco_mask.area(annotation["segmentation"]) == annotation["area"] == 61 * 72


def test_outlines_are_cleaned_if_that_is_chosen(page: Browser, server: PageServer, image: Path):
    """The choice holds for the object in hand at once, and the mask that was chosen stays so."""
    areas = []

    def asked(number: int) -> dict:
        last = refined(page, server, number)
        assert server.refined[-1]["max_hole_area"] == server.refined[-1]["max_sprinkle_area"]
        areas.append(server.refined[-1]["max_hole_area"])
        return last

    begin(page, image)
    page.click("#click-clean")  # nothing in hand: nothing is asked
    click(page, 30, 30)
    page.click("#click-clean")  # an outline that nobody changed
    assert server.refined == []
    click(page, 70, 60, alt=True)
    first = asked(1)
    click(page, 60, 60, alt=True)
    second = asked(2)
    assert coco(page)[0]["area"] == 51 * 72
    page.click("#click-clean")
    assert asked(3) == second
    (annotation,) = coco(page)
    assert coco_mask.area(annotation["segmentation"]) == annotation["area"] == 51 * 72 - 1
    page.value("document.querySelector('#click-clean').focus()")
    page.press("z")  # each click has the outline that it was answered
    assert coco(page)[0]["area"] == 61 * 72
    page.click("#click-clean")
    assert asked(4) == first
    page.press("Escape")

    click(page, 200, 100)
    new = asked(5)
    page.click("#click-other")
    page.click("#click-clean")
    assert asked(6) == new
    (annotation,) = (one for one in coco(page) if one["score"] == 0.5)
    assert (annotation["bbox"], annotation["area"]) == ([192, 92, 16, 16], 255)
    page.click("#click-other")
    assert [one["score"] for one in coco(page) if one.get("corrected")] == [0.85, 0.4]
    assert areas == [8, 8, 0, 8, 8, 0]


def test_undo_leads_back_to_what_was_found(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    found = coco(page)
    click(page, 30, 30)
    click(page, 70, 60, alt=True)
    refined(page, server, 1)
    first = coco(page)
    click(page, 50, 60, alt=True)
    refined(page, server, 2)
    page.press("z")
    assert coco(page) == first
    page.press("z", ctrl=True)
    assert coco(page) == found
    assert "corrected" not in found[0]
    page.press("z")  # there is no more
    assert "Correcting gear" in state(page)
    assert len(server.refined) == 2
    click(page, 60, 60, alt=True)  # and on from there
    assert refined(page, server, 3)["clicks"] == [{"x": 60, "y": 60, "label": 0}]
    page.press("Escape")
    assert "Click an outline" in state(page)
    assert coco(page)[0]["bbox"] == [9, 9, 51, 72]


def test_a_new_object_gets_the_chosen_name(page: Browser, server: PageServer, image: Path):
    begin(page, image, "gear", "bolt")
    page.select("#click-prompt", "bolt")
    click(page, 200, 100)
    asked = refined(page, server, 1)
    assert asked == {"clicks": [{"x": 200, "y": 100, "label": 1}], "box": None, "mask": None}
    assert counts(page) == [[1, 2]]
    page.click("#click-other")  # the next of three outlines
    new = [one for one in coco(page) if one.get("corrected")]
    assert [(one["category_id"], one["score"], one["bbox"]) for one in new] == [(2, 0.5, [192, 92, 16, 16])]
    click(page, 210, 110)
    assert refined(page, server, 2)["mask"].keys() == {"mask_id"}
    page.click("#click-done")
    assert has_focus(page).startswith("canvas")
    # A box, and a second object of the other name.
    page.select("#click-prompt", "gear")
    page.drag(on_screen(page, 120, 100), on_screen(page, 160, 150))
    asked = refined(page, server, 3)
    assert (asked["clicks"], asked["box"], asked["mask"]) == ([], [120, 100, 160, 150], None)
    assert counts(page) == [[2, 2]]
    page.press("z")  # of an object without a click nothing is left
    assert counts(page) == [[1, 2]]


def test_one_object_after_the_other(page: Browser, server: PageServer, image: Path):
    # "New object", or N, ends the one in hand and begins another, which may lie on an outline.
    begin(page, image, "gear", "bolt")
    click(page, 200, 100)
    refined(page, server, 1)
    page.click("#click-new")
    assert "New gear: click it" in state(page)
    assert page.value("document.querySelector('#click-new').disabled")
    click(page, 30, 30)
    assert refined(page, server, 2)["clicks"] == [{"x": 30, "y": 30, "label": 1}]
    page.press("n")
    click(page, 100, 150)
    assert refined(page, server, 3)["clicks"] == [{"x": 100, "y": 150, "label": 1}]
    assert counts(page) == [[4, 1]]
    page.press("n")
    page.press("Escape")  # begun and left: there is no object without a click
    assert counts(page) == [[4, 1]]


def test_an_object_gets_another_name(page: Browser, server: PageServer, image: Path):
    # A found one, which then is none of the first prompt any more, and a new one before and after its first click.
    begin(page, image, "gear", "bolt")
    before = counts(page)
    click(page, 30, 30)
    page.select("#click-prompt", "bolt")
    assert "Correcting bolt" in state(page)
    gears, bolts = before[0]
    assert counts(page) == [[gears - 1, bolts + 1]]
    page.click("#click-clean")  # of an outline that nobody clicked, nothing is asked again
    page.click("#click-clean")
    assert server.refined == []
    page.press("z")
    assert counts(page) == before
    page.select("#click-prompt", "bolt")
    page.press("n")
    page.select("#click-prompt", "gear")
    click(page, 200, 100)
    refined(page, server, 1)
    assert counts(page) == [[gears, bolts + 1]]
    page.select("#click-prompt", "bolt")
    assert counts(page) == [[gears - 1, bolts + 2]]
    corrected = [one["category_id"] for one in coco(page) if one.get("corrected")]
    assert corrected == [2, 2]


def test_clicks_outlive_other_prompts_and_settings_but_not_the_image(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    click(page, 30, 30)
    click(page, 70, 60, alt=True)
    refined(page, server, 1)
    page.press("Escape")
    page.type("#prompt-input", "bolt", key="Enter")
    wait_until(lambda: counts(page) == [[1, 1]], "the answer")
    assert ["by hand" in name for name in shown(page)] == [True, False]
    page.select("#nms", "none")
    wait_until(lambda: len(counts(page)[0]) == 2 and counts(page)[0][1] == 2, "what overlaps")
    assert counts(page) == [[2, 2]]  # the corrected one takes the place of the one that was found
    page.choose_file("#file", image)
    wait_until(lambda: "by hand" not in " ".join(shown(page)), "the same image anew")
    answered(page)


def test_what_is_no_longer_kept_is_sent_again(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    click(page, 30, 30)
    server.keeps_masks = False
    click(page, 70, 60, alt=True)
    asked = refined(page, server, 2)
    assert asked["mask"]["size"] == [180, 240]
    assert coco_mask.area(asked["mask"]) == 72 * 72 - 1
    server.forget_images()
    page.failed_loads.clear()
    click(page, 60, 60, alt=True)
    wait_until(lambda: server.num_uploads == 2, "the image again")
    wait_until(lambda: coco(page)[0]["bbox"] == [9, 9, 51, 72], "the mask")


def test_the_panel_is_busy_until_the_last_click_is_answered(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    click(page, 30, 30)
    server.holds_refined = True
    busy = "document.querySelector('[aria-busy=true]') !== null"
    for number in (1, 2):
        click(page, 70 - number, 60, alt=True)
        wait_until(lambda number=number: len(server.refined) == number, "the question")
        page.value("new Promise(done => setTimeout(done))")  # what ends the question before is done
        assert page.value(busy)
    page.press("Escape")  # and no longer than anything is asked
    page.wait(f"!({busy})")
    click(page, 30, 30)
    click(page, 69, 60, alt=True)
    wait_until(lambda: len(server.refined) == 3, "the question")
    server.holds_refined = False
    page.wait(f"!({busy})")


def test_a_refused_click_is_taken_back(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    click(page, 30, 30)
    for number in range(6):
        click(page, 70 - number, 60, alt=True)
        refined(page, server, number + 1)
    before = coco(page)
    click(page, 40, 60, alt=True)
    page.wait("!document.querySelector('#error').hidden")
    assert "too many clicks" in page.text("#error-message")
    assert coco(page) == before
    click(page, 41, 60, alt=True)
    assert len(refined(page, server, 8)["clicks"]) == 7  # not eight


def test_outlines_are_chosen_in_the_list_and_clicked_by_keyboard(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    page.click(".row")
    assert "Correcting gear" in state(page)
    assert has_focus(page).startswith("canvas")
    page.press("ArrowLeft")
    page.press("Enter")
    asked = refined(page, server, 1)
    (made,) = asked["clicks"]
    assert (made["label"], made["y"]) == (1, 90)
    assert made["x"] < 120
    page.press("ArrowRight")
    page.press("Enter", alt=True)
    assert [one["label"] for one in refined(page, server, 2)["clicks"]] == [1, 0]


def test_clicks_that_say_nothing(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    click(page, 220, 100, alt=True)  # not this, of no object
    assert "Click the object itself first" in page.text("#status")
    frame = page.rectangle("canvas")
    beside = (frame["x"] + 2, frame["y"] + frame["height"] / 2)
    page.drag(beside, beside)
    page.click("[name=tool][value=move]")
    assert page.value("document.querySelector('#click-bar').hidden")
    click(page, 30, 30)
    page.press("z")
    assert server.refined == []


def test_without_a_prompt_a_name_is_asked_for(page: Browser, server: PageServer, image: Path):
    page.choose_file("#file", image)
    page.wait("!document.querySelector('#work').hidden")
    page.click("[name=tool][value=click]")
    page.value("document.querySelector('canvas').scrollIntoView({block: 'center'})")
    click(page, 30, 30)
    assert "Add a prompt first" in page.text("#status")
    assert server.refined == []


def test_each_panel_has_its_own(page: Browser, server: PageServer, image: Path):
    begin(page, image)
    pick(page, "compare", "shapes")
    answered(page, panels=2)
    page.value("document.querySelector('canvas').scrollIntoView({block: 'center'})")
    click(page, 30, 30)
    click(page, 70, 60, alt=True)
    refined(page, server, 1)
    rows = "[...document.querySelectorAll('.panel')].map(panel => panel.innerText.includes('by hand'))"
    assert page.value(rows) == [True, False]
    second = "document.querySelector('.panel:nth-child(2) .row').click()"
    page.value(second)
    page.value("document.querySelector('.panel:nth-child(2) canvas').focus()")
    page.press("Enter")
    refined(page, server, 2)
    assert [one["adapter"] for one in server.refined] == [None, "shapes"]
    assert page.value(rows) == [True, True]


def test_fingers_switch_between_in_and_out(phone: Browser, server: PageServer, image: Path):
    begin(phone, image)
    assert phone.value("document.documentElement.scrollWidth <= innerWidth")
    click(phone, 30, 30)
    phone.press_on("#click-side [value=out]")
    click(phone, 70, 60)
    assert refined(phone, server, 1)["clicks"] == [{"x": 70, "y": 60, "label": 0}]
    phone.press_on("#click-side [value=in]")
    click(phone, 20, 20)
    assert [one["label"] for one in refined(phone, server, 2)["clicks"]] == [0, 1]
    phone.press_on("#click-undo")
    phone.press_on("#click-done")
    assert phone.value("document.documentElement.scrollWidth <= innerWidth")
    assert "1 by hand" in phone.text(".group summary")
    smallest = phone.value(
        "Math.min(...[...document.querySelectorAll('#click-bar :is(button, label:not(#click-name)), #tool label')]"
        ".filter(one => one.checkVisibility()).map(one => one.getBoundingClientRect().height))"
    )
    assert smallest >= 32


@pytest.mark.parametrize("clicks", [False, True])
def test_the_tool_is_offered_where_the_service_answers_clicks(browser: Browser, image: Path, clicks: bool):
    with PageServer(clicks=clicks).running() as server:
        open_page(browser, server.url)
        ask(browser, image, "gear")
        assert browser.value("document.querySelector('#tool-click').checkVisibility()") is clicks
        assert ("keep_masks" in server.questions[0]) is clicks


def test_a_click_adapter_is_picked_where_there_is_one(page: Browser, server: PageServer, image: Path):
    begin(page, image, "gear")
    assert not page.value("document.querySelector('#click-picker').checkVisibility()")
    click(page, 200, 20)
    refined(page, server, 1)
    assert server.refined[0]["click_adapter"] is None
    edges = {"id": "edges", "task": "clicks", "prompts": [], "post_processing": None}
    server.adapters = [*server.adapters, edges]
    open_page(page, server.url)
    begin(page, image, "gear")
    page.wait("document.querySelector('#click-picker').checkVisibility()")
    pick(page, "click-adapter", "edges")
    assert options(page, "click-adapter") == ["Base model", "edges"]
    page.value("document.querySelector('canvas').scrollIntoView({block: 'center'})")
    click(page, 200, 20)
    refined(page, server, 2)
    assert (server.refined[1]["adapter"], server.refined[1]["click_adapter"]) == (None, "edges")


def test_a_click_adapter_is_asked_on_the_trunk_that_it_goes_with(page: Browser, server: PageServer, image: Path):
    row = {"task": "clicks", "prompts": [], "post_processing": None, "clicks_vision": "adapter"}
    server.adapters = [
        *server.adapters,
        row | {"id": "edges", "clicks_vision": "base", "vision_adapters": []},
        row | {"id": "lonely", "vision_adapters": []},
        row | {"id": "over-shapes", "vision_adapters": ["shapes"]},
    ]
    open_page(page, server.url)
    pick(page, "adapter", "road")
    begin(page, image, "gear")
    page.wait("document.querySelector('#click-picker').checkVisibility()")
    pick(page, "click-adapter", "edges")
    click(page, 200, 20)
    refined(page, server, 1)
    page.click("#click-adapter")
    page.wait("document.querySelectorAll('#click-adapter-list li').length === 4")
    refused = "[...document.querySelectorAll('#click-adapter-list [aria-disabled=true]')].map(one => one.textContent)"
    lonely, over = page.value(refused)
    assert "not here" in lonely
    assert "pick that as adapter first" in over
    page.press("Escape")
    pick(page, "adapter", "shapes")
    answered(page)
    pick(page, "click-adapter", "over-shapes")
    page.value("document.querySelector('canvas').scrollIntoView({block: 'center'})")
    click(page, 200, 20)
    refined(page, server, 2)
    asked = [tuple(one[name] for name in ("adapter", "click_adapter", "clicks_vision")) for one in server.refined]
    assert asked == [("road", "edges", "base"), ("shapes", "over-shapes", "adapter")]
    # Another adapter than it goes with: it is said, and not asked.
    pick(page, "adapter", "")
    answered(page)
    page.value("document.querySelector('canvas').scrollIntoView({block: 'center'})")
    click(page, 200, 20)
    page.wait("document.querySelector('#status').textContent.includes('vision trunk of shapes')")
    assert len(server.refined) == 2
