"""`best/` always exists, by a measurement that has a value, and the log says which one and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam3lora.training import trainer
from sam3lora.training.best import deciding_metric, disagreement, is_improved, no_better_than_base
from sam3lora.training.datasets import load_run_data
from sam3lora.training.launch import train
from sam3lora.training.saved_run import RunState
from sam3lora.training.validator import DetectionValidator, Validator

from .changed_scenes import rewritten
from .run_folder import lines_of


def boxes_only(content: dict) -> None:
    """As a detection export has it."""
    for annotation in content["annotations"]:
        annotation["segmentation"] = []


def nothing(content: dict) -> None:
    content["annotations"] = []


def everything_everywhere(content: dict) -> None:
    """Every image shows every category, so that no prompt is absent."""
    shown = content["annotations"][0]
    content["annotations"] = [
        {**shown, "id": 100 * image["id"] + category["id"], "image_id": image["id"], "category_id": category["id"]}
        for image in content["images"]
        for category in content["categories"]
    ]


@pytest.mark.parametrize(
    ("change", "chosen", "decides", "why"),
    [
        (None, "map", "map", None),
        (None, "cgf1", "cgf1", None),
        (None, "bbox_map", "bbox_map", None),
        (boxes_only, "auto", "bbox_map", "no object with a mask"),
        (boxes_only, "bbox_map", "bbox_map", None),
        (everything_everywhere, "cgf1", "bbox_map", "absent"),
        (nothing, "map", "valid_loss", "no object"),
        (boxes_only, "valid_loss", "valid_loss", None),
    ],
)
def test_a_metric_without_a_value_is_replaced(make_config, scenes, tmp_path, change, chosen, decides, why):
    folder = scenes if change is None else rewritten(scenes, tmp_path / "data", change)
    config = make_config("evaluation.every_epochs=1", f"evaluation.best_metric={chosen}", data_dir=str(folder))
    metric, reason = deciding_metric(config, load_run_data(config, 112))
    assert metric == decides
    assert (reason is None) == (why is None)
    assert why is None or why in reason


def test_a_metric_of_absence_has_no_value_where_no_category_is_complete(make_config):
    options = ("evaluation.every_epochs=1", "evaluation.best_metric=cgf1")
    for incomplete, decides in (("data.exhaustive=true", "cgf1"), ("data.exhaustive=false", "bbox_map")):
        config = make_config(*options, incomplete, "training.num_negatives=0")
        assert deciding_metric(config, load_run_data(config, 112))[0] == decides


def test_without_validation_images_the_training_loss_decides(make_config):
    for override, told in (("evaluation.every_epochs=1", True), ("evaluation.every_epochs=0", False)):
        config = make_config(override, "data.valid_split=none")
        metric, reason = deciding_metric(config, load_run_data(config, 112))
        assert (metric, reason is not None) == ("train_loss", told)


@pytest.mark.parametrize(
    ("metric", "values", "base", "told"),
    [
        ("mean_iou_3", [0.10, 0.12], {"mean_iou_3": 0.13}, True),
        ("mean_iou_3", [0.10, 0.12], {"mean_iou_3": 0.11}, False),
        ("noc_85", [4.0, 5.0], {"noc_85": 4.5}, False),
        ("noc_85", [4.0, 5.0], {"noc_85": 3.5}, True),
        ("valid_loss", [2.0, 3.0], {"valid_loss": 2.0}, True),  # nothing was learned
        ("map", [0.1, 0.2], {"valid_loss": 2.0}, False),  # not measured of the base
    ],
)
def test_the_user_is_told_when_a_run_does_not_beat_the_base(metric, values, base, told):
    state = RunState(base_values=base)
    for value in values:
        is_improved(state, metric, {"valid_loss": 1.0, metric: value})
    assert (no_better_than_base(state, metric) is not None) == told


def test_what_was_measured_on_other_data_is_not_compared_with_the_base():
    state = RunState(step=4, base_values={"valid_loss": 0.5})
    state.begin_anew()
    is_improved(state, "valid_loss", {"valid_loss": 1.0})
    assert no_better_than_base(state, "valid_loss") is None


def test_boxes_alone_leave_a_best_adapter(make_config, scenes, tmp_path):
    # Of labels without masks, the best adapter is that of the highest box mAP, and the log says so.
    data = rewritten(scenes, tmp_path / "data", boxes_only)
    config = make_config("evaluation.every_epochs=1", data_dir=str(data), early_stopping_patience=5)
    result = train(config)
    [warning] = lines_of(config, "warning")
    assert "best/ is chosen by bbox_map: map has no value" in warning["message"]
    measured = {line["step"]: line["bbox_map"] for line in lines_of(config, "epoch")}
    assert list(measured) == [3, 6]
    found = json.loads((result.best_adapter / "sam3lora.json").read_text())["metrics"]
    assert found["bbox_map"] == max(measured.values())
    assert found["step"] == next(step for step, value in measured.items() if value == found["bbox_map"])


def test_a_metric_that_had_no_value_leaves_the_last_adapter(make_config, monkeypatch):
    monkeypatch.setattr(DetectionValidator, "metrics", lambda validator: {"map": None})
    config = make_config("evaluation.every_epochs=1")
    result = train(config)
    assert json.loads((result.best_adapter / "sam3lora.json").read_text())["metrics"]["step"] == 6
    assert "best/ is the last adapter" in lines_of(config, "warning")[-1]["message"]


def test_loss_and_metrics_are_measured_where_either_is_due(make_config, monkeypatch):
    # Epochs of 3 steps: the loss every 2 steps, metrics every epoch and with them the loss.
    monkeypatch.setattr(DetectionValidator, "metrics", lambda validator: {"map": 0.5})
    config = make_config("evaluation.every_epochs=1", eval_steps=2, num_epochs=3)
    train(config)
    found = [
        (line["step"], line["valid_loss"] is not None, "map" in line) for line in lines_of(config, "epoch")
    ]  # fmt: skip
    assert found == [
        (2, True, False), (3, True, True), (4, True, False), (6, True, True), (8, True, False), (9, True, True),
    ]  # fmt: skip


def measure(metric: str, *measured: dict[str, float | None]) -> tuple[RunState, list[bool]]:
    """The state after measurements at steps 10, 20 and so on, and whether each was the best so far."""
    state, better = RunState(), []
    for number, values in enumerate(measured, 1):
        state.step = 10 * number
        better.append(is_improved(state, metric, values))
    return state, better


def test_best_by_metric_and_by_loss():
    values = [{"valid_loss": 5.0, "map": 0.1}, {"valid_loss": 4.0}, {"valid_loss": 6.0, "map": 0.3}]
    state, better = measure("map", *values, {"valid_loss": 7.0, "map": 0.2})
    # A loss alone is not compared, and counts for no patience.
    assert better == [True, False, True, False]
    assert (state.best_step, state.best_metric_value, state.best_loss) == (30, 0.3, 6.0)
    assert state.evaluations_without_improvement == 1
    state, better = measure("valid_loss", *values)
    assert better == [True, True, False]
    assert (state.best_step, state.best_loss) == (20, 4.0)


def test_fewer_clicks_are_better():
    values = [
        {"valid_loss": 3.0, "noc_85": 9.0},
        {"valid_loss": 5.0, "noc_85": 4.0},
        {"valid_loss": 6.0, "noc_85": 7.0},
    ]
    state, better = measure("noc_85", *values)
    assert better == [True, True, False]
    assert (state.best_step, state.best_metric_value, state.best_values["noc_85"]) == (20, 4.0, [4.0, 20])
    said = disagreement(state, "noc_85")
    assert all(words in said for words in ("valid_loss was 3 at step 10", "lowest noc_85 4.000 at step 20"))


def test_the_end_says_where_loss_and_metric_disagree():
    early, late = {"valid_loss": 4.0, "map": 0.1}, {"valid_loss": 6.0, "map": 0.3}
    for metric in ("map", "valid_loss"):
        state, _ = measure(metric, early, late)
        said = disagreement(state, metric)
        assert all(words in said for words in ("valid_loss was 4 at step 10", "map 0.300 at step 20", f"by {metric}"))
    assert disagreement(measure("map", late, {"valid_loss": 3.0, "map": 0.4})[0], "map") is None
    assert disagreement(measure("valid_loss", {"valid_loss": 4.0})[0], "valid_loss") is None
    # without validation images the training loss is the loss
    assert "train_loss" not in (disagreement(measure("train_loss", {"train_loss": 1.0})[0], "train_loss") or "")


def test_a_run_says_how_it_was_chosen_and_what_to_change(make_config, monkeypatch):
    # Six steps are few; the lowest loss comes before the highest mAP.
    measured, losses = iter([{"map": 0.1}, {"map": 0.2}]), iter([1.0, 2.0])
    terms_of = Validator.loss_terms

    def scripted(validator):
        terms, loss = terms_of(validator), next(losses)
        terms.loss = lambda: loss
        return terms

    monkeypatch.setattr(Validator, "loss_terms", scripted)
    monkeypatch.setattr(DetectionValidator, "metrics", lambda validator: next(measured))
    config = make_config("evaluation.every_epochs=1", "evaluation.base_loss=false")
    train(config)
    few, differs = (line["message"] for line in lines_of(config, "note"))
    assert few.startswith("6 steps in all")
    assert "training.num_epochs=167 takes 501" in few
    assert "the highest map 0.200 at step 6" in differs


def test_a_step_that_depends_on_the_workers_is_told(make_config, monkeypatch):
    monkeypatch.setattr(trainer.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(trainer.distributed, "gather_objects", lambda value: [value, value])
    for override, told in (("training.images_per_step=null", True), ("training.images_per_step=4", False)):
        config = make_config(override, "training.max_steps=1", output=override[-4:])
        folder = Path(config.output.output_dir)
        folder.mkdir()
        worker = trainer.Trainer(config, folder, use_ray=False)
        assert worker.batches.images_per_step == 4
        notes = [line["message"] for line in worker.log.lines() if line["kind"] == "note"]
        assert sum("training.images_per_step=4" in note for note in notes) == told
