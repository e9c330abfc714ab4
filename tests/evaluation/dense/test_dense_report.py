"""The report of a dense model: which images it shows, what their pictures say, and pages of few and many classes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.data.label_maps import LabelMaps
from sam3lora.evaluation.dense.measure import measure_dense
from sam3lora.evaluation.dense.split_meter import DenseMeter
from sam3lora.evaluation.report.dense_page import render_dense_report, summary_sentence
from sam3lora.evaluation.report.dense_pictures import (
    MISSED,
    OTHER_CLASS,
    RIGHT,
    TOO_MUCH,
    error_map,
    flat_labels,
    pale,
    picture_colours,
    resized_labels,
    tinted,
)
from sam3lora.evaluation.report.worst_and_best import Chosen
from sam3lora.label_values import IGNORE
from sam3lora.model.dense.settings import DenseSettings


def maps(*rows) -> np.ndarray:
    return np.array(rows, np.uint8)[:, None]


def test_errors_of_one_map():
    truth = maps([0, 1, 1, 1, 0, 255])
    predicted = maps([0, 1, 0, 2, 2, 1])
    assert error_map(predicted, truth).tolist() == [[0, RIGHT, MISSED, OTHER_CLASS, TOO_MUCH, IGNORE]]


def test_errors_of_a_map_for_each_class():
    # in both right; one right and one missed; one missed and one too much; ignored in one; ignored in both
    truth = maps([1, 1, 1, 255, 255], [1, 1, 0, 1, 255])
    predicted = maps([1, 1, 0, 1, 1], [1, 0, 1, 1, 0])
    assert error_map(predicted, truth).tolist() == [[RIGHT, MISSED, OTHER_CLASS, RIGHT, IGNORE]]


def test_the_smaller_class_is_on_top():
    assert flat_labels(maps([0, 3, 1])).tolist() == [[0, 3, 1]]
    assert flat_labels(maps([1, 1, 1, 0, 255], [0, 0, 1, 0, 0])).tolist() == [[1, 1, 2, 0, 255]]
    assert flat_labels(maps([0, 0, 1, 0], [1, 1, 1, 0])).tolist() == [[2, 2, 1, 0]]


def test_thin_things_stay_in_small_pictures():
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 13:15] = 3  # a crack of 2 pixels where a pixel of the picture has 4
    labels[::20, 30] = 4  # single pixels
    small = resized_labels(labels, (10, 10))
    assert (small[:, 3] == 3).all()
    assert set(np.unique(small)) == {0, 3}
    assert np.array_equal(resized_labels(labels, (80, 80))[::2, ::2], labels)


def test_the_background_keeps_its_pixels():
    colours = np.full((256, 3), 200, np.uint8)
    image = np.full((2, 2, 3), 50, np.uint8)
    drawn = tinted(image, np.array([[0, 1], [0, 0]], np.uint8), colours)
    assert (drawn[1] == 50).all()
    assert drawn[0, 1].tolist() == [155, 155, 155]


def test_every_class_shows_on_every_image():
    # the palette's seventh colour is a middle grey, its eighth nearly black
    for shade in (0, 64, 128, 255):
        base = pale(np.full((1, 1, 3), shade, np.uint8)).astype(int)
        for value in (*range(1, 63), IGNORE):
            drawn = tinted(base.astype(np.uint8), np.array([[value]], np.uint8), picture_colours())
            assert np.abs(drawn - base).max() > 25, (shade, value)


def test_images_are_named_once():
    quality = np.array([0.5, np.nan, 0.1, 0.9, 0.7, 0.6, 0.8])
    assert Chosen.of(quality, 2) == ([2, 0], [5, 4], [3, 6])
    assert Chosen.of(quality, 4) == ([2, 0, 5, 4], [], [3, 6])
    assert Chosen.of(np.array([np.nan]), 2) == ([], [], [])


def metrics_of(mode: str, classes: tuple[str, ...], images: int = 3):
    rng = np.random.default_rng(0)
    settings = DenseSettings(mode=mode, classes=classes, layers=(0,), width=32)
    meter = DenseMeter(settings, LabelMaps({}))
    num_maps = len(settings.names_of_maps)
    most = len(classes) if mode == "multiclass" else 2
    for number in range(images):
        predicted, truth = rng.integers(0, most, (2, num_maps, 30, 30), dtype=np.uint8)
        meter.add(predicted, truth, rng.random((30, 30)), image_id=number)
    return measure_dense(meter, settings, CocoIndex(None, {}), label="<mine>", settings={}, num_resamples=20)


@pytest.mark.parametrize(
    ("mode", "classes", "rows"),
    [
        ("binary", ("crack",), 2),
        ("multiclass", ("background", *(f"kind {number}" for number in range(40))), 41),
        ("multilabel", ("a", "b"), 0),
    ],
)
def test_a_page_for_each_mode(mode, classes, rows):
    metrics = metrics_of(mode, classes)
    page = render_dense_report(metrics)
    confusion = re.search(r'<table class="compact confusion">(.*?)</table>', page, flags=re.DOTALL)
    assert (confusion[1].count("<tr>") if confusion else 0) == rows + bool(rows)
    assert page.count("<svg") == (2 if mode == "binary" else 0)
    assert "<mine>" not in page  # escaped
    assert all(name in page for name in classes)
    assert f"{metrics.values['mean_iou']:.3f}" in page


def test_a_page_without_images():
    page = render_dense_report(metrics_of("binary", ("crack",), images=0))
    assert "n/a" in page


def test_the_summary_says_what_happens_in_empty_images():
    settings = DenseSettings(mode="binary", classes=("crack",), layers=(0,), width=32)
    meter = DenseMeter(settings, LabelMaps({}))
    for number, predicted in enumerate(([0, 0], [0, 1])):
        meter.add(maps(predicted), maps([0, 0]), np.zeros((1, 2)), image_id=number)
    metrics = measure_dense(meter, settings, CocoIndex(None, {}), label="m", settings={}, num_resamples=5)
    assert "1 of 2 images without any class (50 %)" in summary_sentence(metrics)
