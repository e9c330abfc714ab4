"""Keys of `evaluation`."""

from __future__ import annotations

import json

import pytest

from sam3lora.config import load_config
from sam3lora.config.post_processing import PostProcessing, PostProcessingFields
from sam3lora.errors import UserError
from sam3lora.training import validator
from sam3lora.training.validator import DetectionValidator, Validator

from ...training.run_folder import lines_of
from .conftest import acts

CHANGED = {"threshold": 0.6, "nms_iou": 0.4, "merge": True, "merge_iou": 0.5, "max_detections": 7}


@acts("evaluation.every_epochs")
@pytest.mark.parametrize(("every", "measured"), [(0, []), (2, [2, 3])])
def test_every_epochs_adds_metrics_to_the_log(every, measured, run):
    # The last epoch is always measured, if any is.
    result = run("training.num_epochs=3", f"evaluation.every_epochs={every}")
    assert [line["epoch"] for line in lines_of(result, "epoch") if "map" in line] == measured


@acts("evaluation.base_loss")
def test_base_loss_is_measured_before_the_first_step(plain_run, changed_run):
    assert [len(lines_of(result, "base")) for result in (plain_run, changed_run)] == [1, 0]


@acts("evaluation.best_metric", "training.early_stopping_patience")
@pytest.mark.parametrize(
    ("metric", "epochs", "best"), [("auto", 4, 4), ("map", 4, 4), ("cgf1", 3, 2), ("valid_loss", 2, 1)]
)
def test_best_metric_chooses_the_adapter_and_when_to_stop(metric, epochs, best, run, monkeypatch):
    # mAP rises to the end, cgF1 falls after the second epoch, the loss is lowest after the first.
    measured = iter([{"map": 0.1, "cgf1": 0.1}, {"map": 0.2, "cgf1": 0.5}, {"map": 0.3, "cgf1": 0.2}, {"map": 0.4}])
    losses, validation_terms = iter([1.0, 2.0, 3.0, 4.0]), Validator.loss_terms

    def scripted(run):
        terms, loss = validation_terms(run), next(losses)
        terms.loss = lambda: loss
        return terms

    monkeypatch.setattr(Validator, "loss_terms", scripted)
    monkeypatch.setattr(DetectionValidator, "metrics", lambda validator: next(measured))
    result = run(
        f"evaluation.best_metric={metric}",
        "evaluation.every_epochs=1",
        "evaluation.base_loss=false",
        "training.num_epochs=4",
        "training.early_stopping_patience=1",
    )
    assert [line["epoch"] for line in lines_of(result, "epoch")] == list(range(1, epochs + 1))
    assert json.loads((result.best_adapter / "sam3lora.json").read_text())["metrics"]["epoch"] == best


def test_best_metric_has_to_be_measured():
    for metric in ("map", "cgf1"):
        with pytest.raises(UserError, match=f"best_metric {metric} is never measured while every_epochs is 0"):
            load_config("light", ["evaluation.every_epochs=0", f"evaluation.best_metric={metric}"])
    assert (
        load_config("light", ["evaluation.best_metric=valid_loss"]).evaluation.chosen_best_metric("detection")
        == "valid_loss"
    )


@pytest.fixture
def measured(run, monkeypatch):
    """`measured("a.b=c")` -> the arguments of asking and of measuring while training."""
    calls = {}

    def spy(name):
        function = getattr(validator, name)

        def call(*arguments, **options):
            calls[name] = (arguments, options)
            return function(*arguments, **options)

        monkeypatch.setattr(validator, name, call)

    for name in ("ask_split", "measure_matches"):
        spy(name)

    def make(*overrides):
        run("evaluation.every_epochs=1", *overrides)
        return calls

    return make


@acts("evaluation.num_samples")
def test_num_samples_limits_the_measured_images(measured):
    sizes = [len(measured(*overrides)["ask_split"][0][1]) for overrides in ((), ("evaluation.num_samples=1",))]
    assert sizes == [2, 1]


def test_validation_while_training_detects_as_configured(measured):
    # mAP has no score cut: the threshold counts false alarms, and says what may be merged
    calls = measured(*(f"evaluation.{key}={json.dumps(value)}" for key, value in CHANGED.items()))
    matchers = [calls[name][0][2] for name in ("ask_split", "measure_matches")]
    assert [matcher.post for matcher in matchers] == [PostProcessing(**CHANGED)] * 2


@acts("evaluation.lowest_score")
@pytest.mark.parametrize(("overrides", "lowest"), [((), 0), (("evaluation.lowest_score=0.02",), 0.02)])
def test_lowest_score_is_what_is_asked_for(measured, overrides, lowest):
    assert measured(*overrides)["ask_split"][1]["lowest_score"] == lowest


@acts("evaluation.nms", "evaluation.prompt_thresholds")
@pytest.mark.parametrize(("key", "value"), [("nms", "box"), ("prompt_thresholds", {"crack": 0.4})])
def test_post_processing_has_the_configured_value(key, value):
    config = load_config("light", [f"evaluation.{key}={json.dumps(value)}"])
    assert getattr(config.evaluation.post_processing, key) == value


@acts(*(f"evaluation.{key}" for key in CHANGED))
@pytest.mark.parametrize("key", CHANGED)
def test_adapter_records_how_detections_are_made(key, plain_run, recorded):
    # Inference and serving use the recorded values with this adapter, unless they are told otherwise.
    before, after = recorded(plain_run), recorded()
    assert before[key] == PostProcessingFields.model_fields[key].default
    assert after[key] == CHANGED[key]


@pytest.fixture(scope="module")
def recorded(run):
    """Post-processing in an adapter's metadata; without a run, of one with all keys changed."""
    changed = run("training.max_steps=1", *(f"evaluation.{key}={json.dumps(value)}" for key, value in CHANGED.items()))
    return lambda result=changed: json.loads((result.best_adapter / "sam3lora.json").read_text())["post_processing"]
