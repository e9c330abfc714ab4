"""The report of `compare`: differences and intervals, a sentence no bolder than them, pictures of every category."""

from __future__ import annotations

import dataclasses

import pytest

from sam3lora.evaluation.metrics.bootstrap import Interval
from sam3lora.evaluation.report.comparison_page import category_sentence, comparison_sentence, render_comparison_report
from sam3lora.evaluation.report.glossary import MEASURES

from .report_cases import CRACK, HOLE, NAMES, check_page, measured, table
from .splits import result, write_split

CLEAR = Interval(0.25, 0.125, 0.375, True, 1000)
UNCLEAR = Interval(0.25, -0.125, 0.375, False, 1000)


@pytest.fixture
def split(tmp_path):
    """Image 0 shows two cracks, image 1 a hole, image 2 nothing."""
    return write_split(tmp_path / "s", [(0, CRACK, 5), (0, CRACK, 50), (1, HOLE, 10)], NAMES, num_images=3)


@pytest.fixture
def models(split):
    base = measured(split, [result(1, HOLE, 10, 0.9)])
    adapter = measured(split, [result(0, CRACK, 5, 0.9), result(2, HOLE, 5, 0.9)], "mine")
    return base, adapter


def test_numbers_and_differences_are_those_of_the_metrics(models):
    base, adapter = models
    page = render_comparison_report(base, [adapter], {"mine": {"map": CLEAR, "cgf1": UNCLEAR}})
    text = check_page(page)
    rows = table(page, "Summary")
    for measure in MEASURES:
        before, after = (getattr(metrics, measure.name) for metrics in models)
        if before is None:
            assert rows[measure.label] == ["n/a", "n/a", "n/a"]
        elif isinstance(before, int):
            assert rows[measure.label] == [str(before), str(after), f"{after - before:+d}"]
        else:
            assert rows[measure.label] == [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
    assert "+0.125 to +0.375 excludes zero" in text
    assert "-0.125 to +0.375 includes zero" in text
    crack = table(page, "Categories")["crack"]
    before, after = (metrics.per_category["crack"] for metrics in models)
    assert crack[:4] == ["2", f"{before.map:.3f}", f"{after.map:.3f}", f"{after.map - before.map:+.3f}"]
    assert crack[4:] == [f"{v:.3f}" for v in (before.cgf1, after.cgf1, before.off_prompt_fpr, after.off_prompt_fpr)]
    assert "mine against the base" in text


@pytest.mark.parametrize(
    ("interval", "says", "never"),
    [
        (CLEAR, "mine is better than the base model", "No clear"),
        (Interval(-0.2, -0.3, -0.1, True, 9), "mine is worse than the base model", "better"),
        (UNCLEAR, "No clear difference between mine and the base model", "better"),
        (Interval(0.25, None, None, False, 0), "could not be computed", "better"),
        (None, "could not be computed", "better"),
    ],
)
def test_the_sentence_is_no_bolder_than_the_interval(models, interval, says, never):
    base, adapter = models
    sentence = comparison_sentence(base, adapter, {} if interval is None else {"map": interval})
    assert says in sentence
    assert never not in sentence
    assert f"mAP {adapter.map:.3f} instead of {base.map:.3f}" in sentence
    assert ("excludes zero" in sentence, "includes zero" in sentence) == (
        interval is not None and interval.excludes_zero,
        interval is UNCLEAR,
    )


def test_sentences_on_small_differences_false_alarms_and_categories(models):
    base, adapter = models
    small = dataclasses.replace(base, label="mine", map=base.map + 0.004)
    assert "mine is hardly better" in comparison_sentence(base, small, {"map": Interval(0.004, 0.001, 0.01, True, 9)})
    numbers = "25 %, the base 0 %"
    assert f"{numbers}, a clear difference" in comparison_sentence(base, adapter, {"off_prompt_fpr": CLEAR})
    unclear = comparison_sentence(base, adapter, {"off_prompt_fpr": UNCLEAR})
    assert numbers in unclear
    assert "chance" in unclear
    assert category_sentence(base, adapter) == "mine: mAP is higher in 1 of 2 categories and lower in 1: hole."
    assert category_sentence(base, base) == "base: mAP is higher in 0 of 2 categories and lower in 0."


def test_nothing_to_find_cannot_be_compared(tmp_path):
    folder = write_split(tmp_path / "s", [], NAMES)
    base, adapter = measured(folder, []), measured(folder, [], "mine")
    text = check_page(render_comparison_report(base, [adapter], {"mine": {}}))
    assert "mine cannot be compared" in text
    assert "No picture" not in text


def test_every_category_has_its_pictures(split, models):
    page = render_comparison_report(models[0], [models[1]], {})
    pictures = page.split("<h2>Pictures by category</h2>")[1]
    crack, hole = pictures.split("<h3>crack</h3>")[1].split("<h3>hole</h3>")
    assert "0.png" in crack
    assert "1.png" not in crack
    # found where it is, and where it is not
    assert "1.png" in hole
    assert "2.png" in hole
    assert page.count("data:image/jpeg") == 3 * 3
    for caption in ("labels: 2", "base: 2 missed", "mine: 1 right, 1 missed", "base: 1 right", "mine: 1 wrong"):
        assert caption in pictures


def test_many_categories_share_the_room(tmp_path):
    names = {number: f"category {number}" for number in range(1, 81)}
    objects = [(number % 2, number, 5) for number in range(1, 80)] + [(0, 7, 40), (1, 7, 40)]
    folder = write_split(tmp_path / "s", objects, names, 2)
    base, adapter = (
        measured(folder, found, label, names=names) for label, found in (("base", []), ("mine", [result(1, 1, 5, 0.9)]))
    )
    page = render_comparison_report(base, [adapter], {})
    text = check_page(page)
    assert page.count("data:image/jpeg") == 3 * 79
    assert "No picture of: category 80:" in text
    short = render_comparison_report(base, [adapter], {}, max_pictures=3)
    # those with the most objects
    assert [name for name in names.values() if f"<h3>{name}</h3>" in short] == [
        "category 1",
        "category 2",
        "category 7",
    ]


def test_several_adapters_with_names_that_are_escaped(tmp_path):
    names = {CRACK: "<script>alert(1)</script>", HOLE: "<b>"}
    folder = write_split(tmp_path / "s", [(0, CRACK, 5), (1, HOLE, 5)], names)
    found = {"base": [], "<i>mine</i>": [result(0, HOLE, 5, 0.9)], "other": []}
    base, *adapters = (measured(folder, answers, label, names=names) for label, answers in found.items())
    page = render_comparison_report(base, adapters, {"<i>mine</i>": {"map": CLEAR}})
    text = check_page(page)
    assert "other reaches mAP 0.000" in text
    assert len(table(page, "Summary")["mAP"]) == 5
    assert page.count("<svg") == 1
    for raw in ("<script", "<b>", "<i>mine"):
        assert raw not in page
