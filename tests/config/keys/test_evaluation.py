"""Keys of `evaluation`."""

from __future__ import annotations

import json

import pytest

from sam3lora.train import validation_metrics

from .conftest import lines_of
from .registry import acts


@acts("evaluation.every_epochs")
@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [1, 2]), (2, [2])])
def test_every_epochs_adds_metrics_to_the_log(every, measured, run):
    result = run("training.num_epochs=2", f"evaluation.every_epochs={every}")
    assert [line["epoch"] for line in lines_of(result, "epoch") if "map" in line] == measured


@acts("evaluation.num_samples")
def test_num_samples_limits_the_measured_images(run, monkeypatch):
    sizes = []
    evaluate = validation_metrics.evaluate_split
    monkeypatch.setattr(
        validation_metrics,
        "evaluate_split",
        lambda staged, tokenizer, index, **kw: sizes.append(len(index)) or evaluate(staged, tokenizer, index, **kw),
    )
    run("evaluation.every_epochs=1")
    run("evaluation.every_epochs=1", "evaluation.num_samples=1")
    assert sizes == [2, 1]


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
