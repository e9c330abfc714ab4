"""The report of a sweep: its claims follow from the trials."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sam3lora.data.fault_report import split_faults
from sam3lora.data.faults import FaultLog
from sam3lora.tune.report.charts import ChartedTrials, pareto_front
from sam3lora.tune.report.sentences import held_out_sentence

from ..evaluation.report_cases import check_page
from .made_sweeps import draw_rejections, draw_trials, fail, make_space, page_of, text_of, trial

HELD_OUT = {
    "split": "test", "metric": "map", "base": 0.41, "best": 0.52, "difference": 0.11, "low": 0.06, "high": 0.15,
    "num_images": 40, "note": "", "models": {"plain model": {"map": 0.123, "cgf1": None}},
}  # fmt: skip


def test_a_sweep_that_gained():
    space = make_space()
    records = draw_trials(space, 12)
    best = max((r for r in records if r.value is not None), key=lambda record: record.value)
    assert best.number != 0
    text = text_of(space, records, draw_rejections(space, 3))
    gain = best.value - records[0].value
    assert (
        f"Trial {best.number} is the best: mAP {best.value:.3f} instead of {records[0].value:.3f} with the base "
        f"configuration light ({gain:+.3f})." in text
    )
    assert f"rank {best.values['lora.rank']}" in text
    assert "This value is optimistic" in text
    assert "sam3lora train '/data/outputs/made up/best/config.yaml' --output-dir NEW" in text
    assert "over budget: 3" in text
    assert "loss not finite: the loss of step 37 is nan" in text
    assert "retried after out of memory with batch_size 1, gradient_accumulation_steps 8" in text
    loaded = sum(record.features_loaded for record in records)
    assert f"images went 320 times through the vision trunk, with 320 images in the data; {loaded} times its" in text
    page = page_of(space, records)
    assert page.count("<svg") == 5
    order = [int(n) for n in re.findall(r'<tr[^>]*><td class="number">(\d+)</td>\n<td>', page.split("<h2>Trials")[1])]
    known = [record for record in records if record.value is not None]
    assert order == [r.number for r in sorted(known, key=lambda record: -record.value)] + [4]


@pytest.mark.parametrize("metric", ["map", "valid_loss"])
def test_many_trials(metric):
    space = make_space(metric, algorithm="optuna")
    records = draw_trials(space, 60)
    text = text_of(space, records, draw_rejections(space, 40))
    assert "The first 30 of 40" in text
    assert "take p as a hint" in text
    assert ("lower is better" in text) == (metric == "valid_loss")


def changed(records, **values):
    """The first trials with other values, finished."""
    return [replace(record, value=values[f"t{record.number}"], status="finished") for record in records[: len(values)]]


@pytest.mark.parametrize(
    ("metric", "base", "other", "said"),
    [
        ("map", 0.5, 0.4, "Searching did not beat the base configuration (light): its mAP of 0.500 is the best of 2"),
        ("map", 0.5, 0.505, "(+0.005, hardly a difference)"),
        ("map", 0.5, 0.6, "Trial 1 is the best: mAP 0.600 instead of 0.500"),
        ("valid_loss", 2.0, 2.1, "Searching did not beat the base configuration (light): its validation loss of 2.000"),
        ("valid_loss", 2.0, 1.99, "(-0.010, hardly a difference)"),
        ("valid_loss", 0.02, 0.01, "instead of 0.020 with the base configuration light (-0.010)."),
        ("map", None, 0.4, "The base configuration has no value, so what searching gained is not known"),
        ("map", 0.5, None, "Only the base configuration (light) was measured: mAP 0.500"),
    ],
)
def test_the_answer_is_no_louder_than_the_difference(metric, base, other, said):
    space = make_space(metric)
    text = text_of(space, changed(draw_trials(space, 2), t0=base, t1=other))
    assert said in text
    if "hardly" not in said:
        assert "hardly" not in text


def test_what_is_missing_is_said():
    space = make_space()
    records = draw_trials(space, 3)
    failed = fail(records, "too large <b> & no room")
    begun = replace(failed[0], status="running", failure=None, reason=None)
    for shown, summary, said in [
        ([failed[0], *records[1:]], {"base": None}, "The base configuration failed (out of memory), so"),
        (records[1:], {}, "The base configuration was not tried, so"),
        ([begun, *records[1:]], {"base": None}, "The base configuration has no value yet, so"),
        ([], {"num_trials": 12}, "No trial was begun. The sweep is not over: 0 of 12"),
        (failed, {}, "No trial has a value (3 failed: out of memory). Trial 0: too large <b> & no room"),
        ([begun, *failed[1:]], {}, "No trial has a value (2 failed: out of memory, 1 running). Trial 1: too"),
        (failed, {"num_trials": 12}, "3 of 12 trials have ended"),
        (failed, {"num_trials": 12, "ran_out": True}, "no further configuration"),
    ]:
        assert said in text_of(space, shown, **summary)
    for absent in ("is the best", "sam3lora infer", "optimistic", "Learning curves", "not over"):
        assert absent not in text_of(space, failed)


def test_equal_values():
    space = make_space()
    records = changed(draw_trials(space, 2), t0=0.5, t1=0.5)
    assert "all trials have the same value" in text_of(space, [records[0]] * 7 + [records[1]] * 7)
    records[1].trainable_parameters = records[0].trainable_parameters - 1
    assert "with the base configuration light, but its adapter is smaller" in text_of(space, records)


def test_held_out_images_speak_for_themselves():
    space = make_space()
    records = draw_trials(space, 12)
    text = text_of(space, records, held_out=HELD_OUT)
    assert "On the 40 held-out images of test: mAP 0.520 instead of 0.410 with the base configuration" in text
    assert "(+0.110, 95 % interval +0.060 to +0.150, excludes zero)" in text
    assert "optimistic" not in text
    assert "plain model 0.123 n/a" in text
    unsure = HELD_OUT | {"low": -0.01, "note": "Too few."}
    assert "-0.010 to +0.150, includes zero). Too few." in held_out_sentence(unsure)
    assert "(+0.110)." in held_out_sentence(unsure | {"low": None, "high": None})
    alone = HELD_OUT | {"base": None, "difference": None, "low": None, "high": None}
    assert held_out_sentence(alone) == "On the 40 held-out images of test: mAP 0.520."
    unmeasured = alone | {"best": None, "num_images": 1, "note": "map cannot be measured on them."}
    assert "1 held-out image of test" in held_out_sentence(unmeasured)
    assert "map cannot be measured" in held_out_sentence(unmeasured)
    # A split that could not be read is named, with the reason, and the value stays optimistic.
    failed = held_out_sentence({"split": "test", "failure": "1 listed image(s) not found, e.g. a.jpg"})
    assert "test was not measured: 1 listed image(s) not found, e.g. a.jpg." in failed
    assert "This value is optimistic" in failed


def test_text_of_people_is_escaped():
    space = make_space(parameters={"components": {"choice": ["<script>x", "b & c"]}})
    records = [trial(number, 0.1 * number, components=name) for number, name in enumerate(["b & c", "<script>x"] * 4)]
    page = page_of(space, records, name="<i>mine</i>")
    check_page(page)
    assert "<script>" not in page
    assert "<i>" not in page


def test_a_loss_that_is_far_off_does_not_flatten_the_others():
    records = [trial(n, value) for n, value in enumerate([2.0, 1.0, 1.2, 1.1, 1e6])]
    low, high = ChartedTrials(records, "valid_loss", "loss", "min", 1, 0).limits()
    assert low < 1.0
    assert 2.0 < high < 3.0
    scores = ChartedTrials([trial(0, 0.1), trial(1, 0.5)], "map", "mAP", "max").limits()
    assert scores[0] < 0.1
    assert scores[1] > 0.5


FRONTS = {
    "none": ([], "max", []),
    "without a value": ([(100, None)], "max", []),
    "single": ([(100, 0.1)], "max", [0]),
    "smaller and better beats all": ([(100, 0.5), (200, 0.4), (300, 0.5)], "max", [0]),
    "each larger one is better": ([(300, 0.7), (100, 0.5), (200, 0.6)], "max", [1, 2, 0]),
    "one in between is worse": ([(100, 0.5), (200, 0.4), (300, 0.7)], "max", [0, 2]),
    "same size": ([(100, 0.5), (100, 0.6)], "max", [1]),
    "same value": ([(200, 0.5), (100, 0.5)], "max", [1]),
    "equal in both": ([(100, 0.5), (100, 0.5)], "max", [0, 1]),
    "losses": ([(100, 2.0), (200, 1.0), (300, 1.5)], "min", [0, 1]),
}


@pytest.mark.parametrize(("points", "mode", "expected"), FRONTS.values(), ids=FRONTS.keys())
def test_pareto_front(points, mode, expected):
    records = [trial(number, value, size) for number, (size, value) in enumerate(points)]
    failed = replace(trial(len(points), 0.9 if mode == "max" else 0.1, 10), status="failed")
    assert [record.number for record in pareto_front([*records, failed], mode)] == expected


def test_faults_of_the_labels_are_shown_by_split():
    space = make_space()
    records = draw_trials(space, 3)
    log = FaultLog()
    log.add("missing_image", "image 4 gone.jpg")
    log.add("unknown_category", "annotation 7", count=12)
    faults = split_faults("train", log)
    held_out = HELD_OUT | {"faults": [faults[0] | {"split": "test", "count": 34}]}
    page = page_of(space, records, faults=faults, held_out=held_out)
    assert "46 labels and 1 image are left out" in check_page(page)
    box = page.split('<section class="faults">')[1].split("</section>")[0]
    assert re.findall(r'<th class="number">(\w+)</th>', box) == ["train", "test"]
    assert re.findall(r'<td class="number">(\d+)</td>', box) == ["12", "34", "1", "0"]
    assert "gone.jpg" in box
    # Without faults there is no box, in the report of an earlier version neither.
    assert 'class="faults"' not in page_of(space, records, faults=[])
    assert 'class="faults"' not in page_of(space, records)
