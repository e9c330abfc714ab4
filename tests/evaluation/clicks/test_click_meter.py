"""Numbers of clicks and IoU over objects: by hand, over images, and the clicks that a found mask saves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sam3lora.data.rle import encode_rle
from sam3lora.evaluation.clicks.meter import ClickMeter, clicks_saved, is_measured
from sam3lora.evaluation.clicks.simulated_user import ObjectRun


def run(*ious: float, oracle: float = math.nan, error: float = math.nan, max_clicks: int = 20) -> ObjectRun:
    """IoU before any click and after each; the last value repeats."""
    values = np.full(max_clicks + 1, ious[-1])
    values[: len(ious)] = ious
    return ObjectRun(values, (), oracle, error)


def metered(*runs: ObjectRun, per_image: int = 1, max_clicks: int = 20) -> ClickMeter:
    meter = ClickMeter(max_clicks)
    for number, one in enumerate(runs):
        meter.add(one, image_id=number // per_image, object_id=number)
    return meter


def test_nothing_measured():
    meter = ClickMeter()
    values = meter.values()
    assert values["noc_85"] is None
    assert values["mean_iou_1"] is None
    assert values["nof_85"] == 0
    assert meter.intervals()["noc_85"].low is None
    assert meter.ious().shape == (0, 21)


def test_by_hand():
    meter = metered(
        run(0, 1.0, oracle=1.0, error=0.25),  # one click
        run(0, 0.5, 0.8, 0.82, 0.85, oracle=0.75, error=0.5),  # two clicks to .80, four to .85
        run(0, 0.0),  # never
    )
    assert meter.num_clicks(80).tolist() == [1, 2, 20]
    assert meter.num_clicks(85).tolist() == [1, 4, 20]  # .85 itself is enough
    assert meter.num_clicks(90).tolist() == [1, 20, 20]
    values = meter.values()
    assert values["noc_80"] == pytest.approx(23 / 3)
    assert values["noc_85"] == pytest.approx(25 / 3)
    assert values["noc_90"] == pytest.approx(41 / 3)
    assert [values[f"nof_{t}"] for t in (80, 85, 90)] == [1, 1, 2]
    assert values["mean_iou_1"] == pytest.approx(1.5 / 3)
    assert values["mean_iou_2"] == pytest.approx(1.8 / 3)
    assert values["mean_iou_3"] == pytest.approx(1.82 / 3)
    for k in (5, 8, 20):
        assert values[f"mean_iou_{k}"] == pytest.approx(1.85 / 3)
    # of the objects that have them
    assert values["oracle_iou_1"] == pytest.approx(0.875)
    assert values["score_error_1"] == pytest.approx(0.375)


def test_first_time_counts_although_it_gets_worse_again():
    meter = metered(run(0, 0.2, 0.9, 0.1))
    assert meter.values()["noc_90"] == 2
    assert meter.values()["nof_90"] == 0
    assert meter.values()["mean_iou_20"] == pytest.approx(0.1)


def test_fewer_clicks_cap_what_is_reported():
    meter = metered(run(0, 0.5, max_clicks=5), max_clicks=5)
    values = meter.values()
    assert values["noc_80"] == 5
    assert "mean_iou_5" in values
    assert "mean_iou_8" not in values
    with pytest.raises(ValueError, match="up to 5 clicks, got 20"):
        meter.add(run(0, 0.5), image_id=9, object_id=9)


def test_the_last_click_counts_as_reached():
    meter = metered(run(0, 0, 0, 0.9, max_clicks=3), max_clicks=3)
    assert meter.values()["noc_90"] == 3
    assert meter.values()["nof_90"] == 0


def test_intervals_draw_images_not_objects():
    # Two images of two equal objects each: every draw is one image twice, or both.
    meter = metered(run(0, 1.0), run(0, 1.0), run(0, 0.0), run(0, 0.0), per_image=2)
    found = meter.intervals(num_resamples=200)
    assert (found["mean_iou_1"].low, found["mean_iou_1"].value, found["mean_iou_1"].high) == (0, 0.5, 1)
    assert (found["noc_80"].low, found["noc_80"].high) == (1, 20)
    assert {meter.metrics()(np.array(w))["mean_iou_1"] for w in ([2, 0], [1, 1], [0, 2])} == {1, 0.5, 0}
    assert meter.metrics()(np.array([0, 2]))["nof_80"] == 4
    # an image without an object of a known oracle has no part in it
    assert meter.metrics()(np.array([2, 0]))["oracle_iou_1"] is None


def test_workers_merge_in_the_order_of_images():
    runs = [run(0, value) for value in (0.1, 0.5, 0.9)]
    whole = metered(*runs)
    whole.leave_out(image_id=7, object_id=1)
    first, second = ClickMeter(), ClickMeter()
    second.add(runs[0], image_id=0, object_id=0)
    first.add(runs[2], image_id=2, object_id=2)
    first.add(runs[1], image_id=1, object_id=1)
    second.leave_out(image_id=7, object_id=1)
    first.merge(second)
    assert first.values() == whole.values()
    assert first.num_left_out == 1
    assert first.image_ids == [0, 1, 2]
    np.testing.assert_array_equal(first.ious(), whole.ious())
    # an object counts once, measured or left out, of whichever worker
    with pytest.raises(ValueError, match="again"):
        first.merge(second)
    with pytest.raises(ValueError, match="again"):
        first.add(runs[0], image_id=7, object_id=1)
    with pytest.raises(ValueError, match="again"):
        first.leave_out(image_id=0, object_id=0)
    with pytest.raises(ValueError, match="up to 20 clicks"):
        first.merge(ClickMeter(5))


def test_saved_clicks():
    # Found well enough: all clicks of the object are saved. Found badly: one less. Not found: none.
    without = metered(run(0, 0.9), run(0, 0.1, 0.2, 0.85), run(0, 0.5, 0.85))
    seeded = metered(run(0.95), run(0.6, 0.7, 0.85), run(0, 0.5, 0.85))
    saved = clicks_saved(without, seeded, num_resamples=100)
    assert set(saved) == {"noc_80", "noc_85", "noc_90"}
    assert saved["noc_85"].difference == pytest.approx((1 + 1 + 0) / 3)
    assert saved["noc_90"].difference == pytest.approx(1 / 3)
    assert saved["noc_85"].low < saved["noc_85"].difference < saved["noc_85"].high
    with pytest.raises(ValueError, match="same objects"):
        clicks_saved(without, metered(run(0.9)))


def test_small_objects_are_not_measured():
    truth = np.zeros((200, 200), dtype=bool)  # 1e-4 of it is 4 pixels
    assert not is_measured(encode_rle(truth))
    truth[0, :3] = True
    assert not is_measured(encode_rle(truth))
    truth[0, 3] = True
    assert is_measured(encode_rle(truth))
    # what a crowd hides does not count
    crowd = np.zeros_like(truth)
    crowd[0, 0] = True
    assert not is_measured(encode_rle(truth), encode_rle(crowd))
    # in a tiny image, an object still has a pixel
    assert not is_measured(encode_rle(np.zeros((5, 5), dtype=bool)))
