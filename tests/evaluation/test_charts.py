"""Charts are SVG elements that stand alone in a page: no outside reference, text that is text, equal for equal data."""

from __future__ import annotations

import re

from sam3lora.evaluation.metrics.bootstrap import Interval
from sam3lora.evaluation.report.charts import Line, histogram_chart, interval_chart, line_chart

EDGES = [0, 0.25, 0.5, 0.75, 1]


def lines(description: str = "a chart", **options) -> str:
    drawn = [Line("<b>cgF1</b>", [0.1, 0.5, 0.9], [0.2, 0.5, 0.1]), Line("$recall_2", [0.1, 0.9], [0.8, 0.1])]
    return line_chart(drawn, description=description, x_label="score", y_label="value", **options)


def histogram(**counts: list[int]) -> str:
    return histogram_chart(EDGES, counts, description="scores", x_label="score")


def intervals(*found: Interval) -> str:
    return interval_chart({f"metric {n}": i for n, i in enumerate(found)}, description="change", x_label="change")


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_names_are_text_and_escaped_and_two_charts_on_a_page_do_not_meet():
    svg = lines('what "<it>" shows', marks={"in use <0.30>": 0.3})
    # a dollar sign is no mathematics here
    assert {"&lt;b&gt;cgF1&lt;/b&gt;", "$recall_2", "in use &lt;0.30&gt;", "score", "value"} <= set(texts(svg))
    assert 'aria-label="what &#34;&lt;it&gt;&#34; shows"' in svg
    assert lines() == lines()
    ids = [set(re.findall(r' id="([^"]*)"', lines(description))) for description in ("one", "two")]
    assert not ids[0] & ids[1]


def test_groups_are_drawn_in_percent_whatever_their_size():
    svg = histogram(right=[0, 0, 1, 1], wrong=[5000, 5000, 0, 0])
    assert {"right (2)", "wrong (10000)", "50"} <= set(texts(svg))
    assert "5000" not in texts(svg)
    assert "right (0)" in texts(histogram(right=[0, 0, 0, 0], wrong=[1, 0, 0, 0]))


def test_differences_that_cannot_be_computed_are_left_out():
    nothing, single = Interval(None, None, None, False, 0), Interval(0.3, None, None, False, 0)
    svg = intervals(Interval(0.1, 0.02, 0.2, True, 9), nothing, single)
    assert [text for text in texts(svg) if text.startswith("metric")] == ["metric 0", "metric 2"]
