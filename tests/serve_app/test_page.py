"""The web page in a real browser: what a person does, and what the files hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from .browser import Browser, find_chromium, wait_until
from .page_server import POST, PageServer, canned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed"),
]
BUSY = "document.querySelector('.is-busy')"
SIZE_HW = (180, 240)


@pytest.fixture(scope="module")
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
    browser.problems.clear()
    browser.failed_loads.clear()
    for file in browser.downloads.iterdir():
        file.unlink()
    browser.open(server.url)
    browser.wait("document.querySelectorAll('#adapter option').length === 4")
    yield browser
    assert browser.problems == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)
    path = tmp_path / "road 7.png"
    Image.fromarray(pixels).save(path)
    return path


def ask(page: Browser, image: Path, *prompts: str) -> None:
    page.choose_file("#file", image)
    for prompt in prompts:
        page.type("#prompt-input", prompt, key="Enter")
    answered(page)


def answered(page: Browser, panels: int = 1) -> None:
    shown = "document.querySelectorAll('[data-part=results]:not([hidden])').length"
    page.wait(f"{shown} === {panels} && !{BUSY} && document.querySelectorAll('.group').length > 0")


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


def test_sliders_act_without_another_request(page: Browser, server: PageServer, image: Path):
    ask(page, image, "gear", "nothing")
    assert server.num_uploads == 1
    question = server.questions[-1]
    assert question.pop("image_id") in server.images
    assert question == {
        "prompts": ["gear", "nothing"],
        "boxes": [],
        "adapter": None,
        "threshold": 0.05,
        "nms": "none",
        "merge": False,
        "max_detections": 100,
        "masks": "rle",
    }
    asked = len(server.questions)
    # 0.9 and 0.7 overlap by 0.6: the default NMS takes the lower one.
    assert counts(page) == [[1, 0]]
    page.set_range("#nms-iou", 0.65)
    assert counts(page) == [[2, 0]]
    page.set_range("#threshold", 0.2)
    assert counts(page) == [[3, 0]]
    page.set_range("#nms-iou", 0.55)
    assert counts(page) == [[2, 0]]
    page.set_range("#threshold", 0.95)
    assert counts(page) == [[0, 0]]
    assert len(server.questions) == asked
    assert "14 ms in the service" in page.text("[data-part=time]")


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


def test_a_prompt_is_never_markup_and_a_text_file_is_no_image(
    page: Browser, server: PageServer, image: Path, tmp_path: Path
):
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    page.choose_file("#file", path)
    page.wait("!document.querySelector('#error').hidden")
    assert "cannot read the file as an image" in page.text("#error-message")
    assert server.num_uploads == 0
    ask(page, image, "<img src=x onerror=alert(1)>")
    assert page.value("document.querySelectorAll('main img').length") == 0
    assert page.text(".group-title") == "<img src=x onerror=alert(1)>"


def test_two_adapters_side_by_side_zoom_together(page: Browser, server: PageServer, image: Path):
    ask(page, image, "gear")
    page.choose("#compare", "shapes")
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


def test_adapters_suggest_their_prompts_and_a_broken_one_cannot_be_picked(page: Browser, image: Path):
    assert page.value("document.querySelector('#adapter option[value=torn]').disabled")
    page.choose("#adapter", "shapes")
    suggested = "[...document.querySelectorAll('.suggestion')].map(button => button.textContent)"
    assert page.value(suggested) == ["gear", "arrow"]
    page.choose_file("#file", image)
    page.click("[aria-label='Add arrow']")
    answered(page)
    assert page.value(suggested) == ["gear"]
    assert page.text(".group-title") == "arrow"


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


def test_list_and_image_point_at_each_other(page: Browser, image: Path):
    ask(page, image, "gear")
    page.value("document.querySelector('canvas').scrollIntoView()")
    pixels = "document.querySelector('canvas').toDataURL()"
    before = page.value(pixels)
    page.value("document.querySelector('.row').focus()")
    wait_until(lambda: page.value(pixels) != before, "the detection to stand out")
    page.set_range("#threshold", 0.2)
    page.value("document.querySelector('.row').focus()")
    page.press("ArrowDown")
    assert page.value("[...document.querySelectorAll('.row')].indexOf(document.activeElement)") == 1
    page.value("document.activeElement.blur()")
    page.set_range("#threshold", 0.5)
    wait_until(lambda: page.value(pixels) == before, "it to stand back")
    page.point(*on_screen(page, 30, 30))  # inside the detection of 0.9
    page.wait("document.querySelector('.row.is-highlit')")
    page.point(*on_screen(page, 230, 170))
    page.wait("!document.querySelector('.row.is-highlit')")


def test_downloads_hold_what_is_on_screen(page: Browser, image: Path):
    ask(page, image, "gear", "nothing")
    page.set_range("#threshold", 0.2)
    for part in ("json", "coco", "png"):
        page.click(f"[data-part={part}]")

    answer = json.loads(page.downloaded("road 7_base.json").read_text())
    assert [result["num_detections"] for result in answer["results"]] == [2, 0]
    assert [found["score"] for found in answer["results"][0]["detections"]] == [0.9, 0.3]
    assert answer["settings"] == POST.changed(threshold=0.2).model_dump()

    coco = COCO(str(page.downloaded("road 7_base.coco.json")))
    assert coco.loadImgs([1])[0] == {"id": 1, "file_name": "road 7.png", "width": 240, "height": 180}
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["gear", "nothing"]
    first, second = coco.loadAnns(coco.getAnnIds())
    assert (first["bbox"], first["score"], first["category_id"]) == ([9, 9, 72, 72], 0.9, 1)
    assert coco.annToMask(first).sum() == first["area"] == 72 * 72 - 1
    assert (second["bbox"], second["score"]) == ([108, 108, 54, 54], 0.3)

    with Image.open(page.downloaded("road 7_base.png")) as drawn, Image.open(image) as original:
        assert drawn.size == original.size == (240, 180)
        changed = (np.asarray(drawn.convert("RGB")) != np.asarray(original)).any(-1)
    assert changed[12:78, 12:78].mean() > 0.95  # under the mask of 0.9
    assert not changed[:, 200:].any()  # nothing is there


def test_an_adapter_is_shown_with_its_own_settings_until_they_are_changed(page: Browser, image: Path):
    page.choose("#adapter", "road")
    page.choose("#compare", "")
    ask(page, image, "gear")
    answered(page, panels=2)
    assert [page.text("#threshold-value"), page.value("document.querySelector('#nms').value")] == ["0.20", "none"]
    assert counts(page) == [[4], [1]]
    page.set_range("#threshold", 0.5)
    assert counts(page) == [[3], [1]]
    page.click("#recorded")
    assert counts(page) == [[4], [1]]


def test_overlaps_are_joined_on_their_masks(page: Browser, image: Path):
    ask(page, image, "gear")
    page.set_range("#nms-iou", 1)
    page.set_range("#threshold", 0.2)
    assert counts(page) == [[3]]
    page.click("#merge")
    assert counts(page) == [[2]]
    page.click("[data-part=coco]")
    coco = COCO(str(page.downloaded("road 7_base.coco.json")))
    joined = coco.loadAnns([1])[0]
    parts = canned(np.zeros((*SIZE_HW, 3)), {"prompts": ["gear"], "adapter": None})[0]["detections"]
    union = coco_mask.merge([parts[0]["mask"], parts[1]["mask"]])
    np.testing.assert_array_equal(coco.annToMask(joined), coco_mask.decode(union))
    assert joined["area"] == coco_mask.area(union)
    assert joined["bbox"] == list(coco_mask.toBbox(union))


def test_masks_are_read_and_written_as_pycocotools_does(page: Browser):
    """Random masks, among them an empty one, a full one and one that begins in the first pixel."""
    rng = np.random.default_rng(3)
    masks = [rng.random((37, 23)) < share for share in (0.0, 0.01, 0.5, 0.9, 1.0)]
    masks.append(np.add.outer(np.arange(37), np.arange(23)) < 9)
    for mask in masks:
        other = rng.random((37, 23)) < 0.3
        rles = [coco_mask.encode(np.asfortranarray(one, np.uint8)) for one in (mask, other)]
        texts = [rle["counts"].decode() for rle in rles]
        got = page.value(
            "import('/static/rle.js').then(rle => {"
            f" const [a, b] = {json.dumps(texts)}.map(rle.decodeSpans); const crop = rle.cropOf(a, [37, 23]);"
            " return {again: rle.encodeSpans(a, [37, 23]), both: rle.intersectionPx(a, b), area: rle.areaPx(a),"
            " union: rle.encodeSpans(rle.union(a, b), [37, 23]), bounds: rle.boundsOf(a, 37),"
            " crop: crop && {...crop, bits: [...crop.bits]}}; })"
        )
        x, y, width, height = coco_mask.toBbox(rles[0]).tolist()
        assert got["again"] == texts[0]
        assert got["area"] == mask.sum()
        assert got["both"] == (mask & other).sum()
        assert got["union"] == coco_mask.merge(rles)["counts"].decode()
        assert got["bounds"] == ([x, y, x + width, y + height] if mask.any() else None)
        if mask.any():
            crop = np.array(got["crop"]["bits"]).reshape(got["crop"]["height"], got["crop"]["width"])
            tight = mask[int(y) : int(y + height), int(x) : int(x + width)]
            np.testing.assert_array_equal(crop, np.pad(tight, 1))


def test_an_outline_covers_its_mask(page: Browser):
    """Middles of pixels are inside exactly where the mask is, with holes and pixels that share a corner only."""
    mask = np.random.default_rng(4).random((19, 14)) < 0.5
    counts_ = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    inside = page.value(
        "Promise.all([import('/static/rle.js'), import('/static/outline.js')]).then(([rle, outline]) => {"
        f" const path = outline.outlinePath(rle.decodeSpans({json.dumps(counts_)}), [19, 14]);"
        " const context = document.createElement('canvas').getContext('2d'); const rows = [];"
        " for (let y = 0; y < 19; y++) { rows.push([]); for (let x = 0; x < 14; x++)"
        " rows[y].push(context.isPointInPath(path, x + 0.5, y + 0.5)); } return rows; })"
    )
    np.testing.assert_array_equal(np.array(inside), mask)


def test_many_detections_and_a_large_image(page: Browser, tmp_path: Path):
    """Drawn smaller on screen, downloaded at full size; 200 detections for each of three prompts."""
    path = tmp_path / "wide.png"
    Image.new("RGB", (5000, 400), (90, 90, 90)).save(path)
    ask(page, path, "many", "many ", "gear")  # the second is the first again
    page.set_range("#nms-iou", 1)
    assert counts(page) == [[123, 2]]  # scores of 0.99 - 0.004 n, and 0.9 and 0.7, from 0.5
    page.set_range("#threshold", 0.05)
    assert counts(page) == [[200, 3]]
    page.click("[data-part=png]")
    with Image.open(page.downloaded("wide_base.png")) as drawn:
        assert drawn.size == (5000, 400)
    assert page.value("document.documentElement.scrollWidth <= innerWidth")


def test_an_evicted_image_is_uploaded_again_and_a_busy_service_is_retried_with_a_note(
    page: Browser, server: PageServer, image: Path
):
    ask(page, image, "gear")
    server.forget_images()
    page.type("#prompt-input", "arrow", key="Enter")
    page.wait("document.querySelectorAll('.group').length === 2")
    assert server.num_uploads == 2
    assert page.value("document.querySelector('#error').hidden")
    page.value(
        "window.notes = []; new MutationObserver(() => notes.push(document.querySelector('#status').textContent))"
        ".observe(document.querySelector('#status'), {childList: true}); 0"
    )
    asked = len(server.questions)
    page.type("#prompt-input", "busy", key="Enter")
    page.wait("document.querySelectorAll('.group').length === 3")
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


def test_the_key_stays_in_the_tab(browser: Browser):
    with PageServer(api_key="secret").running() as server:
        browser.problems.clear()
        browser.open(server.url)
        browser.wait("!document.querySelector('#error').hidden && document.querySelector('#key-box').open")
        browser.type("#key", "secret", key="Enter")
        browser.wait("document.querySelectorAll('#adapter option').length === 4")
        assert browser.value("document.querySelector('#error').hidden")
        kept = browser.value("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [["secret"], [], ""]
        browser.value("sessionStorage.clear()")
        assert browser.problems == []


def test_the_sample_answers_with_one_click_on_a_phone(browser: Browser, server: PageServer):
    browser.problems.clear()
    browser.failed_loads.clear()
    browser.open(server.url, width=390, height=844, dark=True)
    browser.click("#sample-first")
    answered(browser)
    assert browser.value("document.querySelectorAll('.count').length") == 3
    assert browser.value("document.documentElement.scrollWidth") == 390
    assert browser.problems == browser.failed_loads == []
