"""Metrics of binary tasks on maps drawn by hand: empty, full, all wrong, one pixel, ignored pixels, merged workers."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.evaluation.dense.saliency import SaliencyMeter
from sam3lora.evaluation.dense.saliency_rows import MEASURES
from sam3lora.evaluation.metrics.bootstrap import bootstrap_value

SQUARE = np.zeros((12, 16), dtype=bool)
SQUARE[3:8, 4:10] = True
NOTHING, EVERYTHING = np.zeros_like(SQUARE), np.ones_like(SQUARE)
PIXELS = SQUARE.size


def measured(*pairs, normalise=False):
    meter = SaliencyMeter(normalise=normalise)
    for number, (prediction, truth) in enumerate(pairs):
        meter.add(np.asarray(prediction, dtype=float), np.asarray(truth), image_id=number)
    return meter.values()


def random_pairs(count: int, size_hw=(21, 18)):
    rng = np.random.default_rng(3)
    for _ in range(count):
        truth = np.zeros(size_hw, np.uint8)
        top, left = rng.integers(1, 9, 2)
        truth[top : top + 9, left : left + 7] = 1
        yield np.clip(0.6 * truth + 0.4 * rng.random(size_hw), 0, 1), truth


def test_no_image():
    values = vars(measured())
    assert values.pop("num_images") == 0
    assert values.pop("notes") == ["no image was measured"]
    assert set(values) == set(MEASURES)
    assert set(values.values()) == {None}


def test_exact():
    values = measured((SQUARE, SQUARE))
    for name in ("s_measure", "f_max", "f_adaptive", "weighted_f", "iou_per_image", "iou_pooled"):
        assert getattr(values, name) == pytest.approx(1), name
    assert (values.mae, values.ber) == (0, 0)
    assert values.e_max == values.e_adaptive == pytest.approx(PIXELS / (PIXELS - 1))
    assert values.notes == []


def test_all_wrong():
    values = measured((~SQUARE, SQUARE))
    assert (values.mae, values.s_measure, values.f_adaptive) == (1, 0, 0)
    assert (values.iou_per_image, values.iou_pooled, values.ber) == (0, 0, 1)
    assert values.e_adaptive == pytest.approx(0)
    # at threshold 0 everything is predicted, and the right pixels with it
    precision = SQUARE.mean()
    assert values.f_max == pytest.approx(1.3 * precision / (0.3 * precision + 1))


def test_truth_without_foreground():
    quarter = np.zeros(SQUARE.shape)
    quarter[:6, :8] = 0.75
    values = measured((quarter, NOTHING), (quarter, SQUARE))
    alone = measured((quarter, NOTHING))
    assert (alone.mae, alone.s_measure) == (0.75 / 4, 1 - 0.75 / 4)
    assert (alone.f_max, alone.weighted_f, alone.iou_per_image, alone.ber) == (0, 0, 0, None)
    assert alone.e_max == pytest.approx(PIXELS / (PIXELS - 1))  # above 0.75 nothing is predicted
    assert alone.e_adaptive == pytest.approx(0.75 * PIXELS / (PIXELS - 1))
    assert "1 of 1" in alone.notes[0]
    # the image has a part in every mean but that of the balanced error rate
    other = measured((quarter, SQUARE))
    assert values.ber == other.ber
    assert values.iou_per_image == other.iou_per_image / 2
    assert values.f_mean == pytest.approx(other.f_mean / 2)


def test_neither_has_foreground():
    values = measured((NOTHING, NOTHING))
    assert (values.iou_per_image, values.iou_pooled, values.s_measure, values.mae) == (1, None, 1, 0)
    assert [note.split(":")[0] for note in values.notes] == ["ber", "iou_pooled"]


def test_truth_of_nothing_but_foreground():
    values = measured((0.75 * SQUARE, EVERYTHING))
    share = SQUARE.mean()
    assert values.s_measure == pytest.approx(0.75 * share)
    assert values.e_adaptive == pytest.approx(share * PIXELS / (PIXELS - 1))
    assert values.f_max == 1  # at threshold 0
    assert values.iou_per_image == share
    assert values.ber is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_images_of_few_pixels_have_values(shape):
    # Variances divide by the number of pixels less one, and quarters may be empty.
    truth = np.zeros(shape, np.uint8)
    truth.flat[-1] = 1
    for prediction in (np.zeros(shape), np.ones(shape), truth.astype(float)):
        values = measured((prediction, truth))
        assert all(np.isfinite(getattr(values, name)) for name in MEASURES if getattr(values, name) is not None)
        assert values.mae == np.abs(prediction - truth).mean()
    assert measured((truth.astype(float), truth)).s_measure == pytest.approx(1)


def test_mean_of_images_is_not_that_of_pixels():
    # One pixel of one found; one of 100 found: mean IoU (1 + 0.01) / 2, pooled 2 / 101.
    large, found = np.zeros((20, 20)), np.zeros((20, 20))
    large[:10, :10], found[0, 0] = 1, 1
    values = measured((found, found.astype(np.uint8)), (found, large.astype(np.uint8)))
    assert values.iou_per_image == pytest.approx((1 + 0.01) / 2)
    assert values.iou_pooled == pytest.approx(2 / 101)


def test_f_of_mirror_papers_averages_precision_and_recall_first():
    # Half of the images perfect, half without a hit: precision and recall 1/2 (the smoothing aside), so F is 1/2.
    shifted = np.roll(SQUARE, 8, axis=1) & ~SQUARE
    values = measured((SQUARE, SQUARE), (shifted, SQUARE))
    assert values.f_max_mirror == pytest.approx(0.5, abs=1e-4)
    # an image without foreground in both counts as found
    assert measured((SQUARE, SQUARE), (NOTHING, NOTHING)).f_max_mirror == pytest.approx(1)
    # at threshold 0 the other F takes all pixels, this one those above 0
    inverted = measured((~SQUARE, SQUARE))
    assert inverted.f_max > 0.1
    assert inverted.f_max_mirror == pytest.approx(0, abs=1e-4)
    # of two maps, one misses half of its object and one doubles it: F(mean P, mean R) is not the mean of F
    half, double = SQUARE.copy(), SQUARE.copy()
    half[:, :7], double[3:8, 10:16] = False, True
    values = measured((half, SQUARE), (double, SQUARE))
    assert values.f_max_mirror == pytest.approx(1.3 * 0.75 * 0.75 / (1.3 * 0.75), abs=1e-4)
    assert values.f_max == pytest.approx((1.3 * 0.5 / (0.3 + 0.5) + 1.3 * 0.5 / (0.3 * 0.5 + 1)) / 2)


def test_stretching_is_for_maps_only():
    # Probabilities from 0.1 to 0.3 find nothing at 0.5, and stretched they are the truth. The decisions at 0.5 stay.
    faint = np.where(SQUARE, 0.3, 0.1)
    plain, stretched = measured((faint, SQUARE)), measured((faint, SQUARE), normalise=True)
    assert stretched.mae == pytest.approx(0)
    assert plain.mae == pytest.approx((0.7 * SQUARE.sum() + 0.1 * (~SQUARE).sum()) / PIXELS)
    assert stretched.s_measure == pytest.approx(1) != plain.s_measure
    assert (plain.iou_per_image, plain.ber) == (stretched.iou_per_image, stretched.ber) == (0, 0.5)
    # a map of one value has nothing to stretch
    assert measured((0.3 * EVERYTHING, SQUARE), normalise=True) == measured((0.3 * EVERYTHING, SQUARE))


@pytest.mark.parametrize("normalise", [False, True])
def test_predictions_on_ignored_pixels_change_nothing(normalise):
    (prediction, truth), *_ = random_pairs(1)
    truth[5:9, 2:12] = 255
    values = []
    for on_ignored in (0.0, 0.5, 1.0):
        changed = np.where(truth == 255, on_ignored, prediction)
        values.append(measured((changed, truth), normalise=normalise))
    assert values[0] == values[1] == values[2]


def test_ignored_rows_are_as_if_they_were_not_there():
    # Every value is that of the pixels that count.
    (prediction, truth), *_ = random_pairs(1)
    ignored = np.concatenate([truth, np.full_like(truth, 255)])
    whole, part = measured((np.concatenate([prediction] * 2), ignored)), measured((prediction, truth))
    for name in MEASURES:
        assert getattr(whole, name) == pytest.approx(getattr(part, name), abs=1e-12), name


def test_the_same_map_in_every_type():
    (prediction, truth), *_ = random_pairs(1)
    levels = (prediction * 255).astype(np.uint8)
    as_bytes, as_float, as_bool = SaliencyMeter(), SaliencyMeter(), SaliencyMeter()
    as_bytes.add(levels, truth, image_id=0)
    as_float.add(levels / 255, truth.astype(np.int64), image_id=0)
    as_bool.add(levels / 255, truth.astype(bool), image_id=0)
    assert as_bytes.values() == as_float.values() == as_bool.values()


def test_two_workers_are_one():
    pairs = list(random_pairs(6))
    whole, first, second = SaliencyMeter(), SaliencyMeter(), SaliencyMeter()
    for number, pair in enumerate(pairs):
        whole.add(*pair, image_id=number)
    for worker, numbers in ((first, (5, 1, 2)), (second, (4, 0, 3))):
        for number in numbers:
            worker.add(*pairs[number], image_id=number)
    first.merge(second)
    assert first.values() == whole.values()
    with pytest.raises(ValueError, match="image 0"):
        first.merge(second)
    with pytest.raises(ValueError, match="normalised"):
        first.merge(SaliencyMeter(normalise=True))


def test_the_bootstrap_measures_the_images_it_draws():
    pairs = [*random_pairs(4), (0.2 * EVERYTHING, NOTHING)]
    meter = SaliencyMeter()
    for number, pair in enumerate(pairs):
        meter.add(*pair, image_id=number)
    repeated = measured(pairs[1], pairs[1], pairs[3], pairs[0], pairs[4])
    rows = meter.rows()
    for name in MEASURES:
        found = rows.metric(name)(np.array([1, 2, 0, 1, 1]))
        assert found == pytest.approx(getattr(repeated, name)), name
    assert rows.metric("ber")(np.array([0, 0, 0, 0, 5])) is None
    interval = bootstrap_value(rows.metric("f_max"), 5, num_resamples=100)
    assert interval.low < interval.value == meter.values().f_max < interval.high


def test_precision_and_recall_of_all_pixels():
    meter = SaliencyMeter()
    meter.add(np.where(SQUARE, 1.0, 0.5), SQUARE, image_id=0)
    precision_T, recall_T = meter.rows().precision_recall()
    assert precision_T[0] == precision_T[127] == SQUARE.mean()
    assert (precision_T[128:] == 1).all()
    assert (recall_T == 1).all()


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3), bool), "size"),
        (np.full((2, 2), 1.5), np.zeros((2, 2), bool), "1.5"),
        (np.full((2, 2), np.nan), np.zeros((2, 2), bool), "nan"),
        (np.zeros((2, 2), np.int64), np.zeros((2, 2), bool), "int64"),
        (np.zeros((2, 2)), np.full((2, 2), 7), "7"),
        (np.zeros((2, 2)), np.full((2, 2), 255), "ignored|none"),
        (np.zeros((0, 2)), np.zeros((0, 2), bool), "size"),
    ],
)
def test_what_cannot_be_measured(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        SaliencyMeter().add(prediction, truth, image_id=0)
