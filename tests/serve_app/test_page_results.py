"""The web page in a real browser: what it shows of an answer, and what its downloads hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from .browser import Browser, wait_until
from .page_server import POST, PageServer, canned
from .page_steps import PAGE_MARKS, SIZE_HW, answered, ask, counts, on_screen, pick

pytest_plugins = ["tests.serve_app.page_fixtures"]
pytestmark = PAGE_MARKS


def test_the_threshold_acts_without_another_request(page: Browser, server: PageServer, image: Path):
    ask(page, image, "gear", "nothing")
    (question,) = server.questions
    assert question.pop("image_id") in server.images
    assert question == {"prompts": ["gear", "nothing"], "boxes": [], "adapter": None, "threshold": 0.05}
    # 0.9 and 0.7 overlap by 0.6: the service drops the lower one.
    assert counts(page) == [[1, 0]]
    page.set_range("#threshold", 0.2)
    assert counts(page) == [[2, 0]]
    page.set_range("#threshold", 0.95)
    assert counts(page) == [[0, 0]]
    assert len(server.questions) == 1
    assert "14 ms in the service" in page.text("[data-part=time]")


def test_overlaps_are_dropped_by_the_service(page: Browser, server: PageServer, image: Path):
    ask(page, image, "gear")
    page.set_range("#nms-iou", 0.65)
    wait_until(lambda: counts(page) == [[2]], "both detections")
    assert (server.questions[-1]["nms_iou"], server.questions[-1]["threshold"]) == (0.65, 0.05)
    page.set_range("#nms-iou", 0.55)
    wait_until(lambda: counts(page) == [[1]], "the better one")
    page.select("#nms", "none")
    wait_until(lambda: counts(page) == [[2]], "both detections again")
    assert "nms_iou" not in server.questions[-1]  # the service refuses it there
    assert server.num_uploads == 1


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
    ask(page, image, "gear")
    pick(page, "adapter", "road")
    pick(page, "compare", "")
    answered(page, panels=2)
    wait_until(lambda: counts(page) == [[4], [1]], "both answers")
    assert [page.text("#threshold-value"), page.value("document.querySelector('#nms').value")] == ["0.20", "none"]
    assert counts(page) == [[4], [1]]
    page.set_range("#threshold", 0.5)
    assert counts(page) == [[3], [1]]
    page.click("#recorded")
    assert counts(page) == [[4], [1]]


def test_what_overlaps_is_joined_by_the_service_and_shown_as_it_answers(page: Browser, server: PageServer, image: Path):
    ask(page, image, "gear")
    page.set_range("#threshold", 0.2)
    page.click("#merge")
    wait_until(lambda: server.questions[-1].get("merge"), "a question that joins")
    answered(page)
    question = server.questions[-1]
    # What the person set and nothing else: the adapter's own values hold for the rest.
    assert (question["threshold"], question.keys() & {"nms", "nms_iou", "max_detections"}) == (0.2, set())
    assert counts(page) == [[1]]
    page.click("[data-part=coco]")
    coco = COCO(str(page.downloaded("road 7_base.coco.json")))
    (joined,) = canned(np.zeros((*SIZE_HW, 3)), question)[0]["detections"]
    np.testing.assert_array_equal(coco.annToMask(coco.loadAnns([1])[0]), coco_mask.decode(joined["mask"]))
    page.set_range("#threshold", 0.4)  # changes what is joined
    wait_until(lambda: server.questions[-1]["threshold"] == 0.4, "the next question")
    page.click("#merge")
    wait_until(lambda: counts(page) == [[1]] and not server.questions[-1].get("merge"), "the answer without joining")
    page.set_range("#nms-iou", 0.65)
    wait_until(lambda: counts(page) == [[2]], "two that are not joined")


def test_detections_without_pixels_are_neither_listed_nor_exported(page: Browser, image: Path):
    ask(page, image, "dust")
    assert counts(page) == [[1]]
    assert "1 of 1 candidates" in page.text(".group summary")
    page.click("[data-part=json]")
    answer = json.loads(page.downloaded("road 7_base.json").read_text())
    assert [found["score"] for found in answer["results"][0]["detections"]] == [0.9]


def test_masks_are_read_as_pycocotools_does(page: Browser):
    """Random masks, among them an empty one, a full one and one that begins in the first pixel."""
    rng = np.random.default_rng(3)
    masks = [rng.random((37, 23)) < share for share in (0.0, 0.01, 0.5, 0.9, 1.0)]
    masks.append(np.add.outer(np.arange(37), np.arange(23)) < 9)
    for mask in masks:
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        got = page.value(
            "import('/static/rle.js').then(rle => {"
            f" const crop = rle.cropOf(rle.decodeSpans({json.dumps(rle['counts'].decode())}), [37, 23]);"
            " return crop && {...crop, bits: [...crop.bits]}; })"
        )
        assert (got is None) == (not mask.any())
        if mask.any():
            x, y, width, height = (int(side) for side in coco_mask.toBbox(rle))
            crop = np.array(got["bits"]).reshape(got["height"], got["width"])
            np.testing.assert_array_equal(crop, np.pad(mask[y : y + height, x : x + width], 1))
            assert (got["left"], got["top"]) == (x - 1, y - 1)


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
    wait_until(lambda: counts(page) == [[123, 2]], "all that overlaps")  # 0.99 - 0.004 n from 0.5
    page.set_range("#threshold", 0.05)
    assert counts(page) == [[200, 3]]
    page.click("[data-part=png]")
    with Image.open(page.downloaded("wide_base.png")) as drawn:
        assert drawn.size == (5000, 400)
    assert page.value("document.documentElement.scrollWidth <= innerWidth")


def test_each_of_32_prompts_has_a_colour_of_its_own_on_which_white_can_be_read(page: Browser):
    rgb = page.value(
        "import('/static/drawing.js').then(({colourOf}) => {"
        " const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
        " return Array.from({length: 32}, (_, slot) => {"
        " context.fillStyle = colourOf(slot); context.fillRect(0, 0, 1, 1);"
        " return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)]; }); })"
    )
    colours = np.array(rgb) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    contrast = 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    assert contrast.min() >= 4.5
    apart = np.abs(colours[:, None] - colours[None]).sum(-1)[~np.eye(32, dtype=bool)]
    assert apart.min() > 0.08


def test_a_very_thin_image_is_shown_in_part_wide_enough_to_see(page: Browser, tmp_path: Path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 20000), (200, 0, 0)).save(path)
    page.choose_file("#file", path)
    page.wait("!document.querySelector('#work').hidden")
    assert "a part is shown" in page.text("#image-size")
    red = (
        "(() => { const c = document.querySelector('canvas'); const {data} = c.getContext('2d')"
        ".getImageData(0, c.height / 2, c.width, 1); return data.filter((v, i) => i % 4 === 0 && v > 150).length; })()"
    )
    wait_until(lambda: page.value(red) >= 10, "ten red pixels side by side")
