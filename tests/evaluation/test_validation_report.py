"""The report of `validate`: whole, equal to the metrics, honest about what is missing, and safe with odd values."""

from __future__ import annotations

import pytest

from sam3lora.evaluation.metrics.ranking import MatchCounts
from sam3lora.evaluation.report.glossary import MEASURES
from sam3lora.evaluation.report.validation_page import render_validation_report, summary_sentence, threshold_advice

from .report_cases import CRACK, HOLE, NAMES, check_page, measured, table
from .splits import result, write_split


@pytest.fixture
def split(tmp_path):
    """Image 0 shows two cracks, image 1 a hole, image 2 nothing."""
    return write_split(tmp_path / "s", [(0, CRACK, 5), (0, CRACK, 50), (1, HOLE, 10)], NAMES, num_images=3)


# One crack found well, one detection beside the hole, a false alarm.
SOME = [result(0, CRACK, 5, 0.9), result(1, HOLE, 50, 0.6), result(2, CRACK, 30, 0.4), result(2, HOLE, 30, 0.2)]


def shown(value: float | int | None) -> str:
    if value is None or isinstance(value, int):
        return "n/a" if value is None else str(value)
    return f"{value:.3f}"


def test_every_number_is_that_of_the_metrics(split):
    metrics = measured(split, SOME, "mine")
    page = render_validation_report([metrics])
    text = check_page(page)
    assert table(page, "Summary") == {m.label: [shown(getattr(metrics, m.name))] for m in MEASURES}
    for name, entry in metrics.per_category.items():
        cells = (entry.num_ground_truth, entry.map, entry.map_50, entry.map_75, entry.mar_100, entry.cgf1)
        best = "n/a" if entry.best_threshold is None else f"{entry.best_threshold:.2f}"
        assert table(page, "Categories")[name] == [*map(shown, cells), shown(entry.off_prompt_fpr), best]
    assert "3 images, 3 labelled objects, 2 prompts" in text
    assert "mine finds 1 of 3 labelled objects (33 %) and misses 2; 2 of 3 detections (67 %) are wrong" in text
    assert "1 of 4 times (25 %)" in text
    assert "torch 2.8" in text
    assert "Validation of mine" in text


def test_pictures_are_the_worst_the_best_and_the_false_alarms(split):
    page = render_validation_report([measured(split, SOME, "mine")])
    worst, best = page.split("<h2>Worst images</h2>")[1].split("<h2>Best images</h2>")[0], "<h2>Best images</h2>"
    # of equal quality, the one with more errors; what is among the worst is not repeated among the best
    assert [name in worst for name in ("0.png", "1.png", "2.png")] == [True, True, True]
    assert worst.index("1.png") < worst.index("2.png") < worst.index("0.png")
    assert best not in page
    assert "“crack” in 2.png" in page
    assert "“hole” in" not in page
    few = render_validation_report([measured(split, SOME)], num_worst=1, num_false_alarms=0)
    assert few.count("data:image/jpeg") == 2 + 2


def test_several_results_stand_side_by_side(split):
    results = [measured(split, []), measured(split, SOME, "mine"), measured(split, SOME[:1], "other")]
    page = render_validation_report(results)
    text = check_page(page)
    assert table(page, "Summary")["mAP"] == [f"{r.map:.3f}" for r in results]
    for label in ("the base model finds none", "mine finds 1 of 3", "other finds 1 of 3"):
        assert label in text
    assert page.count("<h3>mine</h3>") == 1


def test_no_ground_truth(tmp_path):
    folder = write_split(tmp_path / "s", [], NAMES)
    metrics = measured(folder, [result(0, CRACK, 5, 0.9)])
    page = render_validation_report([metrics])
    text = check_page(page)
    assert "nothing to find in these images and the base model makes 1 wrong detection." in text
    assert table(page, "Summary")["mAP"] == ["n/a"]
    assert table(page, "Categories")["crack"][:2] == ["0", "n/a"]
    assert any(note in text for note in metrics.notes)
    quiet = check_page(render_validation_report([measured(folder, [])]))
    assert "makes no detection" in quiet


def test_what_is_missing_is_said_or_left_out(split):
    text = check_page(render_validation_report([measured(split, SOME, exhaustive=False)]))
    assert "False alarms for absent prompts could not be measured" in text
    page = render_validation_report([measured(split, SOME, split_dir=None)])  # without the images
    check_page(page)
    assert "data:image" not in page
    assert "Worst images" not in page
    page = render_validation_report([measured(split, [])])
    assert "0 of 4 times (0 %)" in check_page(page)
    assert "<h2>False alarms</h2>" not in page


def test_eighty_categories(tmp_path):
    names = {number: f"category {number}" for number in range(1, 81)}
    objects = [(number % 4, number, 5) for number in names] + [(0, 33, 50)]
    metrics = measured(write_split(tmp_path / "s", objects, names, 4), [result(1, 1, 5, 0.9)], names=names)
    page = render_validation_report([metrics])
    check_page(page)
    rows = table(page, "Categories")
    assert rows.keys() == set(names.values())
    # the largest first, the others in their order
    assert list(rows)[:3] == ["category 33", "category 1", "category 2"]


def test_names_are_escaped(tmp_path):
    names = {CRACK: "<script>alert(1)</script>", HOLE: "a & “b” $x$"}
    folder = write_split(tmp_path / "s", [(0, CRACK, 5), (1, HOLE, 5)], names)
    predictions = [result(0, CRACK, 5, 0.9), result(1, CRACK, 5, 0.8)]
    page = render_validation_report([measured(folder, predictions, "<i>mine</i>", names=names)], title="<u>")
    check_page(page)
    for raw in ("<script", "<i>mine", "<u>"):
        assert raw not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "“&lt;script&gt;" in page


def test_threshold_advice(split, tmp_path):
    # at 0.50 the second crack and the hole are lost
    metrics = measured(split, [result(0, CRACK, 5, 0.9), result(0, CRACK, 50, 0.4), result(1, HOLE, 10, 0.4)])
    assert metrics.sweep.best_cgf1 > metrics.cgf1
    best = f"{metrics.sweep.best_threshold:.2f} would give cgF1 {metrics.sweep.best_cgf1:.3f}"
    assert f"{best} instead of {metrics.cgf1:.3f} at 0.50" in threshold_advice(metrics)
    assert threshold_advice(metrics) in check_page(render_validation_report([metrics]))
    # none helps
    assert threshold_advice(measured(split, [])) == ""
    assert threshold_advice(measured(split, SOME, exhaustive=False)) == ""
    perfect = [result(0, CRACK, 5, 0.9), result(0, CRACK, 50, 0.9), result(1, HOLE, 10, 0.9)]
    assert "0.50 gives the best cgF1: " in threshold_advice(measured(split, perfect))
    # every image shows the only category: no negatives, no cgF1
    folder = write_split(tmp_path / "all", [(0, CRACK, 5), (1, CRACK, 5)], {CRACK: "crack"})
    advice = threshold_advice(measured(folder, [result(0, CRACK, 5, 0.4)], names={CRACK: "crack"}))
    assert "0.40" in advice
    assert "negatives" in advice


def test_the_summary_counts_false_alarms(split):
    metrics = measured(split, [result(2, CRACK, 30, 0.4), result(2, CRACK, 50, 0.4), result(0, HOLE, 30, 0.9)])
    # two prompts answered, one of them twice
    assert summary_sentence(metrics, MatchCounts(0, 3, 3)).endswith("2 of 4 times (50 %).")
