"""The Pareto front of value and size on cases drawn by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sam3lora.tune.report.charts import pareto_front

from .made_sweeps import trial

CASES = {
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


@pytest.mark.parametrize(("points", "mode", "expected"), CASES.values(), ids=CASES.keys())
def test_front(points, mode, expected):
    records = [trial(number, value, size) for number, (size, value) in enumerate(points)]
    failed = replace(trial(len(points), 0.9 if mode == "max" else 0.1, 10), status="failed")
    assert [record.number for record in pareto_front([*records, failed], mode)] == expected
