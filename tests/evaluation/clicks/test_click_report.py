"""Metrics and report of clicks: counts, values by category, which part of an image is shown, and the page."""

from __future__ import annotations

import functools
import math
from collections import Counter

import numpy as np
import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.data.rle import encode_rle
from sam3lora.engine.clicks.click import Click
from sam3lora.evaluation.clicks.measure import ClickMetrics, measure_clicks
from sam3lora.evaluation.clicks.simulated_user import ObjectRun
from sam3lora.evaluation.clicks.split_clicks import ClickedFacts, SplitClicks
from sam3lora.evaluation.report.click_page import hardness, render_click_report, summary_sentences
from sam3lora.evaluation.report.click_pictures import IN_RGB, MASK_RGB, OUT_RGB, TRUTH_RGB, draw_clicks, shown_part

from ..splits import rle, write_split
from .click_cases import SIDE, square

CLICKS = 4


def run(*ious: float) -> ObjectRun:
    """The last value repeats."""
    values = np.full(CLICKS + 1, ious[-1])
    values[: len(ious)] = ious
    clicks = tuple(Click(12 + number, 12, int(number == 0)) for number in range(len(ious) - 1))
    return ObjectRun(values, clicks, math.nan, math.nan)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> CocoIndex:
    """Two images with two objects, and one without any."""
    objects = [(0, 1, 10), (0, 2, 40), (1, 1, 10), (1, 1, 40)]
    folder = write_split(tmp_path_factory.mktemp("split") / "valid", objects, {1: "gear", 2: "<bolt>"}, num_images=3)
    return CocoIndex.from_folder(folder)


@pytest.fixture(scope="module")
def clicks() -> SplitClicks:
    """One object a worker. Clicks to .85 alone: 1, never, 2, 1; from text: 0, never (not found), 1, 2."""
    runs = {
        (0, 0): (run(0, 0.9), run(0.86)),
        (0, 1): (run(0, 0.1), run(0, 0.1)),
        (1, 0): (run(0, 0.8, 0.88), run(0.7, 0.9)),
        (1, 1): (run(0, 0.95), run(0.6, 0.5, 0.85)),
    }
    whole = SplitClicks.empty(CLICKS)
    for (image_id, number), (alone, from_text) in runs.items():
        part = SplitClicks.empty(CLICKS)
        part.counts.update(images=1, crowds=number, without_mask=1)
        part.alone.add(alone, image_id=image_id, object_id=number)
        part.from_text.add(from_text, image_id=image_id, object_id=number)
        shown = {count: rle(10, 10, 20, (60, 80)) for count in (1, 3, 8)}
        is_found = number == 0 or image_id == 1
        part.facts[image_id, number] = ClickedFacts(
            "<bolt>" if (image_id, number) == (0, 1) else "gear", is_found, shown
        )
        whole.merge(part)
    whole.alone.leave_out(image_id=2, object_id=0)
    return whole


def measured(clicks: SplitClicks, index: CocoIndex, start_from="both") -> ClickMetrics:
    measure = functools.partial(measure_clicks, num_resamples=20)
    return measure(clicks, index, ["gear", "<bolt>"], label="<mine>", start_from=start_from, settings={"data": "here"})


def test_values_of_all_workers(clicks, index):
    metrics = measured(clicks, index)
    assert (metrics.num_images, metrics.num_images_with_objects, metrics.num_objects) == (3, 2, 4)
    assert (metrics.num_too_small, metrics.num_without_mask, metrics.num_crowds, metrics.num_found) == (1, 4, 2, 3)
    values = metrics.to_dict()
    assert values["task"] == "clicks"
    assert values["noc_85"] == pytest.approx((1 + 4 + 2 + 1) / 4)
    assert values["nof_85"] == 1
    assert values["mean_iou_1"] == pytest.approx((0.9 + 0.1 + 0.8 + 0.95) / 4)
    assert "mean_iou_5" not in values  # more clicks than were allowed
    assert values["from_text"]["noc_85"] == pytest.approx((0 + 4 + 1 + 2) / 4)
    assert values["from_text"]["num_found"] == 3
    saved = values["clicks_saved"]["noc_85"]
    assert saved["difference"] == pytest.approx(0.25)
    assert saved["low"] <= 0.25 <= saved["high"]
    assert values["per_category"]["gear"]["num_objects"] == 3
    assert values["per_category"]["gear"]["noc_85"] == pytest.approx(4 / 3)
    assert values["per_category"]["gear"]["from_text_noc_85"] == pytest.approx(1)
    assert values["per_category"]["gear"]["num_found"] == 3
    assert values["per_category"]["<bolt>"]["mean_iou_1"] == pytest.approx(0.1)
    assert values["per_category"]["<bolt>"]["num_found"] == 0
    assert {"low", "high"} == values["intervals"]["noc_85"].keys()


def test_values_without_a_prompt(clicks, index):
    alone = SplitClicks(clicks.alone, SplitClicks.empty(CLICKS).from_text, clicks.facts, clicks.counts)
    values = measured(alone, index, start_from=None).to_dict()
    assert values["noc_85"] == 2
    assert values.keys().isdisjoint({"from_text", "clicks_saved"})
    assert not any("found" in name or "text" in name for name in values["per_category"]["gear"])


def test_the_page(clicks, index):
    metrics = measured(clicks, index)
    page = render_click_report(metrics, num_pictures=1)
    assert "<mine>" not in page  # escaped, as are names of categories
    assert "<bolt>" not in page
    assert page.count("<svg") == 2
    assert page.count("<figure>") == 3
    # a picture ends with the panel in which the last click was made: of objects with 1, 1 and 2 clicks the first has
    # one panel, and that of 2 clicks a second one
    worst, median, best = np.argsort(hardness(clicks.alone))[[0, 1, 3]]
    made = [len(clicks.alone.runs[row].clicks) for row in (worst, median, best)]
    assert page.count("data:image/jpeg") == sum(1 if number == 1 else 2 for number in made) == 4
    assert f"{metrics.alone['noc_85'].value:.3f}" in page
    said = summary_sentences(metrics)
    assert "2.00 clicks" in said
    assert "1 of 4 objects (25 %)" in said
    assert "saves 0.25 clicks" in said


def test_a_page_without_objects(index):
    metrics = measured(SplitClicks(*(SplitClicks.empty(CLICKS).alone for _ in range(2)), {}, Counter()), index)
    page = render_click_report(metrics)
    assert page.count("<svg") == page.count("<figure>") == 0
    assert metrics.to_dict()["noc_85"] is None
    assert any("nothing is measured" in note for note in metrics.notes)


def test_the_part_that_is_shown():
    truth = encode_rle(square(20, 20, 12))
    rows, columns = shown_part([truth, encode_rle(square(20, 20, 4)), encode_rle(square(0, 0, 0))], [])
    assert (rows, columns) == (slice(12, 40), slice(12, 40))  # 8 pixels around
    rows, columns = shown_part([truth], [Click(60, 25, 0)])  # 41 pixels wide: a quarter is 11, cut at the border
    assert (rows, columns) == (slice(9, 43), slice(9, SIDE))


def test_a_drawn_object():
    image = np.full((SIDE, SIDE, 3), 128, np.uint8)
    truth, mask = encode_rle(square(16, 16, 32)), encode_rle(square(32, 16, 32))
    whole = (slice(0, SIDE), slice(0, SIDE))
    drawn = draw_clicks(image, truth, mask, [Click(20, 32, 1), Click(56, 32, 0)], whole, 256)
    assert drawn.shape == (256, 256, 3)

    def is_near(y: int, x: int, colour) -> bool:
        around = drawn[4 * y - 6 : 4 * y + 10, 4 * x - 6 : 4 * x + 10].reshape(-1, 3).astype(int)
        return bool((np.abs(around - colour).max(axis=1) < 20).any())

    assert is_near(32, 20, IN_RGB)
    assert is_near(32, 56, OUT_RGB)
    assert not is_near(32, 20, OUT_RGB)
    assert is_near(32, 16, TRUTH_RGB)  # its left side
    assert is_near(20, 63, MASK_RGB)  # the right side of the mask
    assert drawn[4 * 40, 4 * 24].tolist() == [128] * 3  # within the truth alone
    assert drawn[4 * 40, 4 * 56, 2] > 140  # within the mask: blue
    part = draw_clicks(image, truth, mask, [], (slice(8, 40), slice(8, 24)), 64)
    assert part.shape == (64, 32, 3)
