"""Keys of `evaluation`."""

from __future__ import annotations

import json

import pytest

from sam3lora.infer.values import PostProcessing
from sam3lora.train import validation_metrics

from .conftest import lines_of
from .registry import acts


@acts("evaluation.every_epochs")
@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [1, 2]), (2, [2])])
def test_every_epochs_adds_metrics_to_the_log(every, measured, run):
    result = run("training.num_epochs=2", f"evaluation.every_epochs={every}")
    assert [line["epoch"] for line in lines_of(result, "epoch") if "map" in line] == measured


@pytest.fixture
def measured(run, monkeypatch):
    """`measured("a.b=c")` -> the arguments of asking and of measuring while training."""
    calls = {}

    def spy(name):
        function = getattr(validation_metrics, name)

        def call(*arguments, **options):
            calls[name] = (arguments, options)
            return function(*arguments, **options)

        monkeypatch.setattr(validation_metrics, name, call)

    for name in ("ask_split", "measure_split"):
        spy(name)

    def make(*overrides):
        run("evaluation.every_epochs=1", *overrides)
        return calls

    return make


@acts("evaluation.num_samples")
def test_num_samples_limits_the_measured_images(measured):
    sizes = [len(measured(*overrides)["ask_split"][0][2]) for overrides in ((), ("evaluation.num_samples=1",))]
    assert sizes == [2, 1]


def test_validation_while_training_detects_as_configured(measured):
    # mAP has no score cut: the threshold counts false alarms, and says what may be merged
    changes = {"prob_threshold": 0.6, "nms_iou": 0.4, "merge": True, "merge_iou": 0.5, "max_detections": 7}
    calls = measured(*(f"evaluation.{key}={json.dumps(value)}" for key, value in changes.items()))
    assert calls["ask_split"][1]["post"] == PostProcessing(
        threshold=0.0, nms="mask", nms_iou=0.4, merge=True, merge_iou=0.5, merge_threshold=0.6, max_detections=7
    )
    assert calls["measure_split"][1]["threshold"] == 0.6


@acts(
    "evaluation.prob_threshold",
    "evaluation.nms_iou",
    "evaluation.merge",
    "evaluation.merge_iou",
    "evaluation.max_detections",
)
@pytest.mark.parametrize(
    ("key", "name", "default", "changed"),
    [
        ("prob_threshold", "detection_threshold", 0.3, 0.6),
        ("nms_iou", "nms_iou", 0.7, 0.4),
        ("merge", "merge", False, True),
        ("merge_iou", "merge_iou", 0.15, 0.5),
        ("max_detections", "max_detections", 100, 7),
    ],
)
def test_adapter_carries_how_detections_are_made(key, name, default, changed, run):
    # What inference and serving use with this adapter unless they are told otherwise.
    def saved(*overrides):
        folder = run("training.max_steps=1", *overrides).best_adapter
        return json.loads((folder / "sam3lora.json").read_text())["thresholds"]

    before, after = saved(), saved(f"evaluation.{key}={json.dumps(changed)}")
    assert before[name] == default
    assert after == {**before, name: changed}
