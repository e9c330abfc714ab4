"""The web page in a real browser: choosing adapters and comparing them."""

from __future__ import annotations

from pathlib import Path

from .browser import Browser, wait_until
from .page_server import ADAPTERS, POST, PageServer
from .page_steps import PAGE_MARKS, answered, ask, counts, options, pick

pytest_plugins = ["tests.serve_app.page_fixtures"]
pytestmark = PAGE_MARKS


def test_adapters_suggest_their_prompts_and_a_broken_one_cannot_be_picked(page: Browser, image: Path):
    pick(page, "adapter", "torn")
    assert page.value("document.querySelector('#adapter').value") == "Base model"
    pick(page, "adapter", "shapes")
    suggested = "[...document.querySelectorAll('.suggestion')].map(button => button.textContent)"
    assert page.value(suggested) == ["gear", "arrow"]
    page.choose_file("#file", image)
    page.click("[aria-label='Add arrow']")
    answered(page)
    assert page.value(suggested) == ["gear"]
    assert page.text(".group-title") == "arrow"


def test_new_adapters_are_in_the_list_without_a_reload(page: Browser, server: PageServer):
    server.adapters = [*ADAPTERS, {"id": "welds", "prompts": ["crack"], "post_processing": POST.model_dump()}]
    pick(page, "adapter", "welds")
    assert page.text("#suggestions .suggestion") == "crack"


def test_thousands_of_adapters_are_searched_in_the_service(page: Browser, server: PageServer):
    many = [{"id": f"line-{n:04}", "prompts": [f"part {n}"], "post_processing": POST.model_dump()} for n in range(3000)]
    server.adapters = many
    page.value("document.querySelector('#adapter').focus()")
    page.press("ArrowDown")
    page.wait("document.querySelectorAll('#adapter-list [role=option]').length === 51")
    page.press("ArrowUp")  # stays at the first
    for _ in range(6):
        page.press("PageDown")
    page.wait("document.querySelectorAll('#adapter-list [role=option]').length === 101")  # the next page
    assert {listing["limit"] for listing in server.listings} == {"50"}
    page.call("Input.insertText", text="part 2718")
    wait_until(lambda: options(page, "adapter") == ["line-2718"], "the adapter that knows the prompt")
    field = "document.querySelector('#adapter')"
    active = f"document.getElementById({field}.getAttribute('aria-activedescendant'))"
    assert page.value(f"[{field}.role, {field}.ariaExpanded, {active}.role]") == ["combobox", "true", "option"]
    assert page.value(f"{active}.querySelector('b').textContent") == "line-2718"
    page.press("Enter")
    assert page.value(f"[{field}.value, {field}.ariaExpanded]") == ["line-2718", "false"]
    assert page.text("#suggestions .suggestion") == "part 2718"
    page.call("Input.insertText", text="nothing like it")
    page.wait("document.querySelector('#adapter-list').textContent.includes('No adapter')")
    page.press("Escape")
    assert page.value(f"[{field}.value, document.activeElement.id]") == ["line-2718", "adapter"]


def test_where_nothing_is_found_an_adapter_that_was_trained_on_it_is_offered(
    page: Browser, server: PageServer, image: Path
):
    ask(page, image, "pothole")
    assert counts(page) == [[0]]
    page.wait("document.querySelector('[data-part=offer]').checkVisibility()")
    assert "road was trained on pothole" in page.text("[data-part=offer]")
    page.click("[data-part=pick]")
    wait_until(lambda: counts(page) == [[4]], "the answer of the adapter")
    assert server.questions[-1]["adapter"] == "road"
    assert not page.value("document.querySelector('[data-part=offer]').checkVisibility()")
    page.type("#prompt-input", "nothing", key="Enter")  # no adapter knows it
    wait_until(lambda: counts(page) == [[4, 0]], "the second prompt")
    assert not page.value("document.querySelector('[data-part=offer]').checkVisibility()")


def test_the_sample_asks_the_adapter_that_knows_it_unless_one_was_picked(page: Browser, server: PageServer):
    page.click("#sample-first")
    answered(page)
    assert server.questions[-1]["adapter"] == "shapes"
    assert counts(page) == [[2, 2, 2]]
    pick(page, "adapter", "")
    wait_until(lambda: server.questions[-1]["adapter"] is None, "the base model to be asked")
    page.click("#sample")
    wait_until(lambda: server.num_uploads == 2, "the sample again")
    answered(page)
    assert server.questions[-1]["adapter"] is None


def test_two_adapters_side_by_side_zoom_together(page: Browser, server: PageServer, image: Path):
    ask(page, image, "gear")
    pick(page, "compare", "shapes")
    answered(page, panels=2)
    assert counts(page) == [[1], [2]]
    assert {question["adapter"] for question in server.questions[-2:]} == {None, "shapes"}
    assert server.num_uploads == 1
    titles = page.value("[...document.querySelectorAll('.panel h2')].map(title => title.textContent)")
    assert titles == ["Base model", "shapes"]
    pixels = "[...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())"
    seen: list[list[str]] = []

    def is_painted() -> bool:  # the picture of the answer comes a frame after its counts
        seen.append(page.value(pixels))
        return seen[-1:] == seen[-2:-1]

    wait_until(is_painted, "both canvases to come to rest")
    before = seen[-1]
    page.click("#zoom-in")
    page.wait("document.querySelector('#zoom-value').textContent === '150 %'")
    wait_until(lambda: all(a != b for a, b in zip(before, page.value(pixels))), "both canvases to zoom")
    page.click("#zoom-fit")
    wait_until(lambda: page.value(pixels) == before, "both canvases to show all again")


def test_pictures_side_by_side_have_the_same_top(page: Browser, server: PageServer, image: Path):
    """However many lines their headers take."""
    name = "-".join(["welds-of-the-second-line"] * 4)
    server.adapters = [*ADAPTERS, {"id": name, "prompts": ["crack"], "post_processing": POST.model_dump()}]
    ask(page, image, *(f"part {number}" for number in range(9)))
    pick(page, "compare", name)
    answered(page, panels=2)
    sides = "[...document.querySelectorAll('canvas')].map(e => e.getBoundingClientRect()).map(({x, y}) => [x, y])"
    (left, first), (right, second) = page.value(sides)
    assert first == second
    assert right > left
    heads = "[...document.querySelectorAll('.panel > header')].map(head => head.querySelector('ul').offsetTop)"
    assert len(set(page.value(heads))) == 2  # the long name wraps


def test_on_a_phone_two_adapters_are_seen_in_turn_or_one_over_the_other(phone: Browser, image: Path):
    ask(phone, image, "gear")
    pick(phone, "compare", "shapes")
    answered(phone, panels=1)
    wait_until(lambda: counts(phone) == [[1], [2]], "both answers")
    seen = "[...document.querySelectorAll('canvas')].map(canvas => canvas.checkVisibility())"
    assert phone.value(seen) == [True, False]
    phone.press_on("#view [value=second]")
    assert phone.value(seen) == [False, True]
    phone.press_on("#view [value=first]")
    pixels = "document.querySelector('canvas').toDataURL()"
    wait_until(lambda: phone.value(pixels) == phone.value(pixels), "the picture")
    before = phone.value(pixels)
    phone.press_on("#view [value=overlay]")
    wait_until(lambda: phone.value(pixels) != before, "the outlines of the other adapter")
    assert phone.value(seen) == [True, False]
    assert phone.value("[...document.querySelectorAll('.panel h2')].every(title => title.checkVisibility())")
    assert phone.value("document.documentElement.scrollWidth") == 390
