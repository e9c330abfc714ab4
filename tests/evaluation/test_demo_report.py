"""The demo's report: self-contained, honest about the outcome, and safe with odd values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sam3lora.evaluation.metrics.bootstrap import Interval
from sam3lora.evaluation.metrics.comparison import Comparison
from sam3lora.evaluation.metrics.measure import CategoryMetrics, SplitMetrics
from sam3lora.evaluation.report.demo_page import comparison_rows, loss_chart, render_demo_report, verdict
from sam3lora.evaluation.report.pictures import comparison_pictures

from .report_cases import CRACK, check_page, measured
from .splits import result, write_split


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> SplitMetrics:
    folder: Path = write_split(tmp_path_factory.mktemp("s") / "s", [(0, CRACK, 5)], {CRACK: "gear"}, 1)
    return measured(folder, [result(0, CRACK, 5, 0.9)], names={CRACK: "gear"})


@pytest.fixture
def metrics(found):
    """Metrics with these values."""

    def make(value: float | None, presence: float | None = 0.5, notes=()) -> SplitMetrics:
        gear, nut = (CategoryMetrics(v, v, v, v, n, None, None, None) for v, n in ((value, 3), (None, 0)))
        return dataclasses.replace(
            found,
            map=value,
            map_50=value,
            map_75=value,
            presence_accuracy=presence,
            per_category={"gear": gear, "<b>nut</b>": nut},
            notes=list(notes),
        )

    return make


def compared(base: SplitMetrics, adapter: SplitMetrics, margin: float = 0.1) -> Comparison:
    """With an interval that reaches as far as `margin` to both sides of the difference."""
    difference = None if base.map is None or adapter.map is None else adapter.map - base.map
    ends = (None, None) if difference is None else (difference - margin, difference + margin)
    interval = Interval(
        difference, *ends, excludes_zero=difference is not None and abs(difference) > margin, num_resamples=9
    )
    return Comparison(base, [adapter], {adapter.label: {"map": interval}})


def render(base: SplitMetrics, adapter: SplitMetrics, **changes) -> str:
    history = [{"epoch": n, "train_loss": 3.0 / n, "valid_loss": 2.5 / n} for n in (1, 2, 3)]
    arguments = {
        "history": history,
        "pictures": comparison_pictures(base, adapter),
        "facts": {"adapter size": "1.5 MB"},
        "settings": {"base model": "tiny"},
        "next_steps": [("sam3lora train balanced --data-dir DIR", "the real thing")],
        "threshold": 0.3,
    }
    return render_demo_report(compared(base, adapter), **arguments | changes)


def test_page_is_whole_and_refers_to_nothing_outside(metrics):
    page = render(metrics(0.1), metrics(0.4))
    text = check_page(page)
    assert page.count("data:image/jpeg;base64,") == 3
    assert page.count("<polyline") == 2
    for shown in ("0.100", "0.400", "+0.300", "1.5 MB", "sam3lora train balanced --data-dir DIR", "base: 1 right"):
        assert shown in text


def test_names_are_escaped_and_missing_values_are_said(metrics):
    page = render(metrics(None, None, ["map is null: no objects"]), metrics(None, None))
    assert "<b>nut" not in page
    assert "&lt;b&gt;nut" in page
    assert "n/a" in page
    assert "map is null: no objects" in page


@pytest.mark.parametrize(
    ("base", "adapter", "says"),
    [
        (0.1, 0.4, "finds objects"),
        (0.1, 0.4, "between +0.200 and +0.400"),
        (0.4, 0.1, "did not"),
        # better by more than a hundredth, but other images could say otherwise
        (0.2, 0.25, "did not"),
        (None, None, "nothing could be"),
    ],
)
def test_verdict_follows_the_numbers(metrics, base, adapter, says):
    assert says in verdict(compared(metrics(base), metrics(adapter)))


def test_a_gain_must_be_worth_having(metrics):
    assert "did not" in verdict(compared(metrics(0.2), metrics(0.205), margin=0.001))


def test_rows_tell_the_change(metrics):
    rows = {row.label: row for row in comparison_rows(compared(metrics(0.1, 0.5), metrics(0.4, None)))}
    assert rows["mAP"].change == pytest.approx(0.3)
    assert rows["presence accuracy"].change is None
    assert rows["mAP gear (3)"].adapter == 0.4


def test_no_chart_without_two_epochs(metrics):
    assert loss_chart([]) is None
    assert loss_chart([{"epoch": 1, "train_loss": 1.0, "valid_loss": 1.0}]) is None
    assert loss_chart([{"epoch": n, "train_loss": None, "valid_loss": None} for n in (1, 2)]) is None
    assert "<svg" not in render(metrics(0.1), metrics(0.2), history=[])


@pytest.mark.parametrize("values", [[502.4, 171.8, 116.4], [2.0, 2.0], [1e-4, 3e-4], [-1.0, 1.0]])
def test_chart_stays_in_its_frame(values):
    chart = loss_chart([{"epoch": n + 1, "train_loss": v, "valid_loss": v / 2} for n, v in enumerate(values)])
    for _, points in chart["series"]:
        for x, y in points:
            assert chart["left"] <= x <= chart["right"]
            assert 12 <= y <= chart["bottom"]
    # larger losses are higher up
    (_, points), _ = chart["series"]
    assert (points[0][1] < points[-1][1]) == (values[0] > values[-1])
    assert 3 <= len(chart["y_ticks"]) <= 8
