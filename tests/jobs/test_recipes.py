"""The study of recipes: its intervals and pairs by hand; and a run of one step of each recipe."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from jobs.bench.recipes import NEW, OLD, SETS, RecipeReport, RecipeRun, compare_recipes, interval

RUN = RecipeRun("a", OLD, 1, 60, 10.0, 0.1, 0.2, 0.5, 0.1)


def test_intervals_by_hand():
    # t of 2 degrees of freedom is 4.3027; the standard error of 1, 2, 3 is 1 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / math.sqrt(3)), rel=1e-4)
    assert interval([0.5])[0] == 0.5
    assert math.isnan(interval([0.5])[1])


def test_differences_are_those_of_the_same_set_and_seed():
    # in any order of the runs
    values = {("a", 1): (0.1, 0.4), ("a", 2): (0.3, 0.3), ("b", 1): (0.5, 0.6)}
    runs = [
        replace(RUN, set_name=name, seed=seed, recipe=recipe, map=value)
        for (name, seed), pair in values.items()
        for recipe, value in zip((OLD, NEW), pair, strict=True)
    ]
    for ordered in (runs, runs[::-1]):
        report = RecipeReport(ordered)
        assert report.differences("map") == pytest.approx([0.3, 0.0, 0.1])
        assert report.differences("map", "a") == pytest.approx([0.3, 0.0])
    rows = {(row["set"], row["value"]): row for row in report.rows()}
    assert rows["a", "map"][OLD][0] == pytest.approx(0.2)
    assert rows["all", "map"]["difference"][0] == pytest.approx(0.4 / 3)


@pytest.mark.slow
def test_runs_are_appended_and_not_repeated(tmp_path):
    results = tmp_path / "runs.jsonl"
    options = {"num_train": 12, "num_test": 4, "results": results, "settings": {"max_steps": 1}}
    report = compare_recipes(seeds=[1], **options)
    lines = results.read_text().splitlines()
    assert len(lines) == 2 * len(SETS)
    assert {json.loads(line)["steps"] for line in lines} == {1}
    assert all(run.cpu_s > 0 for run in report.runs)
    assert compare_recipes(seeds=[1], **options) == report
    assert results.read_text().splitlines() == lines
