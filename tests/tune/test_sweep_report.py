"""The report of a sweep: its claims follow from the trials."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sam3lora.tune.report.charts import ChartedTrials, learning_curves, progress_chart, size_chart
from sam3lora.tune.report.parallel_coordinates import parallel_coordinates
from sam3lora.tune.report.sentences import held_out_sentence, short_names
from sam3lora.tune.report.sweep_page import render_sweep

from ..evaluation.report_cases import check_page
from .made_sweeps import START, draw_rejections, draw_trials, fail, make_space, summarise_sweep, trial

HELD_OUT = {
    "split": "test", "metric": "map", "base": 0.41, "best": 0.52, "difference": 0.11, "low": 0.06, "high": 0.15,
    "num_images": 40, "note": "", "models": {"plain model": {"map": 0.123, "cgf1": None}},
}  # fmt: skip


def text_of(space, records, rejections=(), **summary) -> str:
    return check_page(page_of(space, records, rejections, **summary))


def page_of(space, records, rejections=(), **summary) -> str:
    return render_sweep(space, records, list(rejections), summarise_sweep(space, records, **summary))


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


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


def test_an_equal_but_smaller_adapter_wins():
    space = make_space()
    records = changed(draw_trials(space, 2), t0=0.5, t1=0.5)
    records[1].trainable_parameters = records[0].trainable_parameters - 1
    assert "with the base configuration light, but its adapter is smaller" in text_of(space, records)


def test_a_base_that_failed_or_was_left_out():
    space = make_space()
    records = draw_trials(space, 3)
    records[0] = fail(records[:1])[0]
    assert "The base configuration failed (out of memory), so" in text_of(space, records, base=None)
    assert "The base configuration was not tried, so" in text_of(space, records[1:])
    records[0] = replace(records[0], status="running")
    assert "The base configuration has no value yet, so" in text_of(space, records, base=None)


def test_all_failed():
    space = make_space()
    text = text_of(space, fail(draw_trials(space, 8), "too large <b> & no room"))
    assert "No trial has a value (8 failed: out of memory). Trial 0: too large <b> & no room" in text
    for absent in ("is the best", "sam3lora infer", "optimistic", "Learning curves"):
        assert absent not in text


def test_nothing_was_begun_and_nothing_has_a_value_yet():
    space = make_space()
    assert "No trial was begun. The sweep is not over: 0 of 12" in text_of(space, [], num_trials=12)
    records = fail(draw_trials(space, 3), "too large")
    records[0] = replace(records[0], status="running", failure=None, reason=None)
    text = text_of(space, records, num_trials=12)
    assert "No trial has a value (2 failed: out of memory, 1 running). Trial 1: too large" in text


def test_fewer_configurations_than_trials():
    space = make_space()
    records = fail(draw_trials(space, 3))
    assert "3 of 12 trials have ended" in text_of(space, records, num_trials=12)
    assert "no further configuration" in text_of(space, records, num_trials=12, ran_out=True)
    assert "not over" not in text_of(space, records)


def test_held_out_images_speak_for_themselves():
    space = make_space()
    records = draw_trials(space, 12)
    text = text_of(space, records, held_out=HELD_OUT)
    assert "On the 40 held-out images of test: mAP 0.520 instead of 0.410 with the base configuration" in text
    assert "(+0.110, 95 % interval +0.060 to +0.150, excludes zero)" in text
    assert "optimistic" not in text
    assert "plain model 0.123 n/a n/a n/a" in text
    unsure = HELD_OUT | {"low": -0.01, "note": "Too few."}
    assert "-0.010 to +0.150, includes zero). Too few." in held_out_sentence(unsure)
    assert "(+0.110)." in held_out_sentence(unsure | {"low": None, "high": None})
    alone = HELD_OUT | {"base": None, "difference": None, "low": None, "high": None}
    assert held_out_sentence(alone) == "On the 40 held-out images of test: mAP 0.520."
    unmeasured = alone | {"best": None, "num_images": 1, "note": "map cannot be measured on them."}
    assert "1 held-out image of test" in held_out_sentence(unmeasured)
    assert "map cannot be measured" in held_out_sentence(unmeasured)


def test_text_of_people_is_escaped():
    space = make_space(parameters={"components": {"choice": ["<script>x", "b & c"]}})
    records = [trial(number, 0.1 * number, components=name) for number, name in enumerate(["b & c", "<script>x"] * 4)]
    page = page_of(space, records, name="<i>mine</i>")
    check_page(page)
    assert "<script>" not in page
    assert "<i>" not in page


def test_long_labels_many_choices_and_equal_values():
    names = [f"a very long name of a set number {number} that goes on and on" for number in range(12)]
    space = make_space(parameters={"components": {"choice": names}, "lora.rank": {"randint": [1, 64]}})
    records = [trial(n, 0.5, 100, components=names[n % 12], lora__rank=3 * n + 1) for n in range(14)]
    assert "all trials have the same value" in text_of(space, records)


def test_charts_draw_pauses_as_nothing_and_say_which_is_best():
    records = [replace(trial(n, 0.1 * n), ended_at=START + 60 * n + (90_000 if n > 2 else 0)) for n in range(1, 6)]
    sessions = [
        {"started_at": START, "ended_at": START + 120},
        {"started_at": START + 90_120, "ended_at": START + 91_000},
    ]
    shown = ChartedTrials(records, "map", "mAP", "max", best=5, base=1)
    found = texts(progress_chart(shown, sessions))
    assert "time the sweep ran (minutes)" in found
    assert {"5", "best", "base", "best so far", "other trials"} <= set(found)
    assert found.count("other trials") == 1


def test_a_stopped_trial_is_marked_where_it_ended():
    history = [{"epoch": epoch, "time": 0, "map": 0.1 * epoch} for epoch in (1, 2, 3)]
    records = [
        replace(trial(n, 0.3), history=history, status=status) for n, status in enumerate(["finished", "stopped"])
    ]
    assert "stopped early" in texts(learning_curves(ChartedTrials(records, "map", "mAP", "max", 0, None)))
    assert "stopped early" not in texts(learning_curves(ChartedTrials(records[:1], "map", "mAP", "max", 0, None)))


def test_a_loss_that_is_far_off_does_not_flatten_the_others():
    records = [trial(n, value) for n, value in enumerate([2.0, 1.0, 1.2, 1.1, 1e6])]
    low, high = ChartedTrials(records, "valid_loss", "loss", "min", 1, 0).limits()
    assert low < 1.0
    assert 2.0 < high < 3.0
    scores = ChartedTrials([trial(0, 0.1), trial(1, 0.5)], "map", "mAP", "max").limits()
    assert scores[0] < 0.1
    assert scores[1] > 0.5


def test_axes_of_the_settings():
    space = make_space()
    records = draw_trials(space, 12)
    parameters = [space.parameters[name] for name in ("lora.rank", "lora.target_modules", "training.learning_rate")]
    short = short_names([parameter.key for parameter in parameters])
    found = texts(parallel_coordinates(ChartedTrials(records, "map", "mAP", "max", 7, 0), parameters, short))
    rates = [record.values["training.learning_rate"] for record in records if record.value is not None]
    assert {"rank", "4", "8", "16", "32", "attention", "all", "learning_rate", "mAP"} <= set(found)
    assert parameters[2].label(min(rates)) in found
    assert parameters[2].label(max(rates)) in found


def test_nothing_to_draw_is_none():
    empty = ChartedTrials([trial(0)], "map", "mAP", "max")
    assert progress_chart(empty, []) is None
    assert learning_curves(empty) is None
    assert size_chart(empty) is None
    assert parallel_coordinates(empty, [], {}) is None


def test_names_are_short_where_that_is_clear():
    names = ["lora.rank", "a.weight", "b.weight", "components"]
    assert short_names(names) == {
        "lora.rank": "rank", "a.weight": "a.weight", "b.weight": "b.weight", "components": "components",
    }  # fmt: skip
