"""The demo's report: self-contained, honest about the outcome, and safe with odd values."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from sam3lora.evaluate.coco_map import CategoryMap
from sam3lora.evaluate.demo_report import comparison_rows, loss_chart, render_demo_report, verdict
from sam3lora.evaluate.split import SplitMetrics


def metrics(value: float | None, presence: float | None = 0.5, notes=()) -> SplitMetrics:
    per_category = {"gear": CategoryMap(value, value, value, 3), "<b>nut</b>": CategoryMap(None, None, None, 0)}
    return SplitMetrics(value, value, value, presence, per_category, 4, 3, [], {}, list(notes))


def render(base: SplitMetrics, adapter: SplitMetrics, **changes) -> str:
    history = [{"epoch": n, "train_loss": 3.0 / n, "valid_loss": 2.5 / n} for n in (1, 2, 3)]
    arguments = {
        "history": history,
        "pictures": [("0.jpg", np.zeros((20, 30, 3), np.uint8))],
        "facts": {"adapter size": "1.5 MB"},
        "settings": {"base model": "tiny"},
        "next_steps": [("sam3lora train balanced --data-dir DIR", "the real thing")],
        "threshold": 0.3,
    }
    return render_demo_report(base, adapter, **arguments | changes)


class Balance(HTMLParser):
    """Counts open elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_refers_to_nothing_outside():
    page = render(metrics(0.1), metrics(0.4))
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "url(" not in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count("<polyline") == 2
    for text in ("0.100", "0.400", "+0.300", "1.5 MB", "sam3lora train balanced --data-dir DIR"):
        assert text in page


def test_names_are_escaped_and_missing_values_are_said():
    page = render(metrics(None, None, ["map is null: no objects"]), metrics(None, None))
    assert "<b>nut" not in page
    assert "&lt;b&gt;nut" in page
    assert "n/a" in page
    assert "map is null: no objects" in page


@pytest.mark.parametrize(
    ("base", "adapter", "says"),
    [(0.1, 0.4, "finds objects"), (0.4, 0.1, "did not"), (0.2, 0.205, "did not"), (None, None, "nothing could be")],
)
def test_verdict_follows_the_numbers(base, adapter, says):
    assert says in verdict(metrics(base), metrics(adapter))


def test_rows_tell_the_change():
    rows = {row.label: row for row in comparison_rows(metrics(0.1, 0.5), metrics(0.4, None))}
    assert rows["mAP"].change == pytest.approx(0.3)
    assert rows["presence accuracy"].change is None
    assert rows["mAP gear (3)"].adapter == 0.4


def test_no_chart_without_two_epochs():
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
