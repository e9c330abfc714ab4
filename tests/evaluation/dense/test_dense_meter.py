"""All that is measured of a dense model, on maps drawn by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.data.label_maps import LabelMaps
from sam3lora.errors import UserError
from sam3lora.evaluation.dense.label_meter import LOGGED, LabelMeter
from sam3lora.evaluation.dense.measure import measure_dense
from sam3lora.evaluation.dense.saliency import SaliencyMeter
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.dense.split_meter import DenseMeter
from sam3lora.evaluation.dense.truth import VALUES, label_notes, true_labels
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.dense.settings import DenseSettings

CLASSES = {"binary": ("crack",), "multiclass": ("background", "road", "tree"), "multilabel": ("road", "tree")}


def settings_of(mode: str, **more) -> DenseSettings:
    return DenseSettings(mode=mode, classes=CLASSES[mode], layers=(0,), width=32, **more)


def meter_of(mode: str, *triples, **more) -> DenseMeter:
    """Of (predicted maps, true maps, probability or None), whose image ids count from 0."""
    meter = DenseMeter(settings_of(mode), LabelMaps({}), **more)
    for number, (predicted, truth, probability) in enumerate(triples):
        meter.add(np.array(predicted, np.uint8), np.array(truth, np.uint8), probability, image_id=number)
    return meter


def measured(meter: DenseMeter, mode: str, **more):
    return measure_dense(
        meter, settings_of(mode), CocoIndex(None, {}), label="mine", settings={}, num_resamples=50, **more
    )


ROAD = ([[[0, 1, 1, 1]]], [[[0, 0, 1, 1]]], None)  # one pixel too much
TREE = ([[[0, 0, 2, 1]]], [[[0, 0, 2, 2]]], None)  # one of another class
EMPTY = ([[[0, 0, 0, 0]]], [[[0, 0, 255, 0]]], None)
ALARM = ([[[0, 0, 0, 2]]], [[[0, 0, 0, 0]]], None)


def test_no_image():
    metrics = measured(meter_of("binary"), "binary")
    assert metrics.num_images == metrics.num_empty_images == 0
    assert set(metrics.values.values()) == {None}
    assert metrics.empty_with_foreground is None
    assert metrics.notes
    json.dumps(metrics.to_dict(), allow_nan=False)


def test_one_map_of_all_classes():
    meter = meter_of("multiclass", ROAD, TREE, EMPTY, ALARM)
    # road: 2 pixels in both, 3 + 1 predicted; tree: 1 in both, 2 predicted, 2 true
    metrics = measured(meter, "multiclass")
    assert metrics.per_class["road"].iou == 2 / 4
    assert metrics.per_class["tree"].iou == 1 / 3
    assert metrics.per_class["background"].pixels == 11
    assert metrics.values["mean_iou_foreground"] == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert metrics.values["pixel_accuracy"] == 12 / 15
    # 2 / 3 of the road; half of the trees and no road; nothing to find; nothing but a tree that is not there
    assert np.array_equal(meter.quality(), [2 / 3, 1 / 4, np.nan, 0], equal_nan=True)
    assert (metrics.num_empty_images, metrics.empty_with_foreground) == (2, 0.5)
    shown = metrics.to_dict()
    assert shown["confusion"] == {"classes": list(CLASSES["multiclass"]), "pixels": [[9, 1, 1], [0, 2, 0], [0, 1, 1]]}
    assert shown["mean_iou"] == metrics.values["mean_iou"]
    assert shown["intervals"]["iou/road"]["low"] <= 0.5 <= shown["intervals"]["iou/road"]["high"]
    assert metrics.intervals["pixel_accuracy"].value == 12 / 15


def test_a_map_for_each_class():
    # road is all right; of the trees, which overlap it, one of two pixels is found
    meter = meter_of("multilabel", ([[[0, 1, 1]], [[0, 0, 1]]], [[[0, 1, 1]], [[0, 1, 1]]], None))
    metrics = measured(meter, "multilabel")
    assert {name: entry.iou for name, entry in metrics.per_class.items()} == {"road": 1, "tree": 0.5}
    assert metrics.values["mean_iou_foreground"] == 0.75
    # each against all else: of the background of the trees one of two pixels is right
    assert metrics.values["mean_iou"] == pytest.approx((1 + (0.5 + 0.5) / 2) / 2)
    assert meter.quality().tolist() == [0.75]
    assert "confusion" not in metrics.to_dict()
    assert "iou/background" not in meter.label_metrics()(np.ones(1))


def test_binary_has_the_measures_of_probabilities():
    rng = np.random.default_rng(0)
    images = [(rng.random((6, 7)), rng.integers(0, 2, (6, 7), dtype=np.uint8)) for _ in range(3)]
    alone = SaliencyMeter(normalise=True)
    for number, (probability, truth) in enumerate(images):
        alone.add(probability, truth, image_id=number)
    triples = [((p >= 0.5)[None], t[None], p) for p, t in images]
    ignored = np.full((1, 2, 2), 255)  # an image of which nothing is judged
    meter = meter_of("binary", *triples, (np.zeros((1, 2, 2)), ignored, np.zeros((2, 2))), normalise=True)
    metrics = measured(meter, "binary")
    for name in ("mae", "s_measure", "f_max", "iou_pooled"):
        assert metrics.values[name] == getattr(alone.values(), name)
        assert metrics.intervals[name].low <= metrics.values[name] <= metrics.intervals[name].high
    assert metrics.values["iou_pooled"] == metrics.per_class["crack"].iou
    assert any("1 image(s)" in note for note in metrics.notes)


@pytest.mark.parametrize("mode", CLASSES)
def test_division_into_workers_changes_nothing(mode):
    rng = np.random.default_rng(1)
    most = 3 if mode == "multiclass" else 2
    shape = (2 if mode == "multilabel" else 1, 9, 8)
    triples = [(*rng.integers(0, most, (2, *shape)), rng.random(shape[1:])) for _ in range(4)]
    whole = meter_of(mode, *triples)
    parts = [DenseMeter(settings_of(mode), LabelMaps({})) for _ in range(2)]
    for number in (2, 0, 3, 1):
        predicted, truth, probability = triples[number]
        parts[number % 2].add(predicted.astype(np.uint8), truth.astype(np.uint8), probability, image_id=number)
    parts[0].merge(parts[1])
    assert parts[0].values() == whole.values()
    assert parts[0].label_metrics()(np.array([2, 0, 1, 1])) == whole.label_metrics()(np.array([2, 0, 1, 1]))
    # weights of one are the set itself
    ones = whole.label_metrics()(np.ones(4))
    assert {name: ones[name] for name in ("mean_iou", "boundary_iou")} == pytest.approx(
        {name: whole.values()[name] for name in ("mean_iou", "boundary_iou")}
    )


@pytest.mark.parametrize("mode", CLASSES)
def test_training_measures_the_same(mode):
    rng = np.random.default_rng(2)
    settings = settings_of(mode, threshold=0.4)
    labels = LabelMaps({"road": 1, "tree": 1 if mode == "binary" else 2}, overlapping=mode == "multilabel")
    square = [[2, 2, 8, 2, 8, 8, 2, 8]]
    record = {"image_id": 3, "height": 12, "width": 10, "annotations": []}
    for category, segmentation in (("road", square), ("tree", [[5, 5, 10, 5, 10, 12, 5, 12]])):
        entry = {"category": category, "segmentation": segmentation, "iscrowd": False, "bbox_xywh": [2, 2, 6, 6]}
        record["annotations"].append(entry)
    logits = rng.normal(size=(len(settings.classes), 6, 6)).astype(np.float32)
    in_training = LabelMeter(settings, labels)
    in_training.add(logits, record)
    from sam3lora.engine.dense_maps import label_maps

    meter = DenseMeter(settings, labels)
    meter.add(label_maps(logits, (12, 10), mode, 0.4), labels.of_record(record), None, image_id=3)
    assert {name: meter.values()[name] for name in LOGGED} == in_training.values()


def test_the_values_of_the_training_decide_what_is_true():
    recorded = AdapterMetadata(data={VALUES: {"crack": 1, "joint": 1}})
    labels = true_labels(recorded, settings_of("binary"))
    assert labels.values == {"crack": 1, "joint": 1}
    assert not labels.overlapping
    # a folder without a record: by the names of the classes
    assert true_labels(AdapterMetadata(), settings_of("multiclass")).values == {"road": 1, "tree": 2}
    by_name = true_labels(AdapterMetadata(), settings_of("multilabel"))
    assert (by_name.values, by_name.overlapping) == ({"road": 1, "tree": 2}, True)


@pytest.mark.parametrize("damaged", [[], {}, {"crack": 2}, {"crack": 0}, {"crack": True}, {"crack": "1"}])
def test_a_damaged_record_is_refused(damaged):
    with pytest.raises(UserError, match=VALUES):
        true_labels(AdapterMetadata(data={VALUES: damaged}), settings_of("binary"))


def test_categories_that_are_no_class():
    labels = LabelMaps({"road": 1, "tree": 2})
    assert label_notes(labels, ["Road", "background"], "x.json") == []
    (note,) = label_notes(labels, ["road", "car"], "x.json")
    assert "car" in note
    assert label_notes(labels, [], "x.json") == []  # a split without any label: all is background
    with pytest.raises(UserError, match=r"x\.json.*road, tree.*car"):
        label_notes(labels, ["car"], "x.json")


def test_what_has_no_effect_is_refused():
    assert DenseEvaluation(threshold=0.3).of_model(settings_of("binary")).threshold == 0.3
    assert DenseEvaluation().of_model(settings_of("multilabel", threshold=0.7)).threshold == 0.7
    for wrong, mode in (({"threshold": 0.3}, "multiclass"), ({"paper_normalisation": True}, "multilabel")):
        with pytest.raises(UserError, match=mode):
            DenseEvaluation(**wrong).of_model(settings_of(mode))
    for wrong in ({"threshold": 1.0}, {"num_samples": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            DenseEvaluation(**wrong)
