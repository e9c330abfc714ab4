"""Faults of the labels are told when a measurement begins, and stand in notes and reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.fault_report import split_faults
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.predictions_file import evaluate_predictions
from sam3lora.evaluation.ask.run import evaluate
from sam3lora.evaluation.report.comparison_page import render_comparison_report
from sam3lora.evaluation.report.validation_page import render_validation_report
from sam3lora.evaluation.settings import EvaluationSettings

from ..data.faulty_labels import FAULTS, add_faults, counts
from .report_cases import CRACK, NAMES, check_page, measured
from .splits import result, write_split

SKIP = EvaluationSettings(on_bad_image="skip")


@pytest.fixture
def split(tmp_path) -> Path:
    return write_split(tmp_path / "valid", [(0, CRACK, 5), (1, CRACK, 10)], NAMES, num_images=3)


@pytest.fixture
def answers(tmp_path) -> Path:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([result(0, CRACK, 5, 0.9), result(1, CRACK, 10, 0.8)]))
    return file


def fault_table(page: str) -> dict[str, str]:
    """What is done and for example -> count, of the table of faults of one split."""
    box = page.split('<section class="faults">')[1].split("</section>")[0]
    rows = re.findall(r'<td class="number">(\d+)</td>\s*<td>(.*?)</td>', box, re.DOTALL)
    return {re.sub(r"<[^>]*>", " ", text): count for count, text in rows}


def test_notes_and_report_of_a_file(split, answers, capsys):
    add_faults(split)
    found = evaluate_predictions(answers, split, SKIP, progress=True)
    told = capsys.readouterr().out
    assert "1 label and 1 image are left out" in told
    assert "gone/a.jpg" in told
    assert counts(found.faults) == FAULTS
    notes = found.to_dict()["notes"]
    assert [note[0] for note in notes[:3]] == ["1", "1", "1"]
    assert sum("gone/a.jpg" in note for note in notes) == 1
    page = render_validation_report([found])
    assert "1 label and 1 image are left out" in check_page(page)
    rows = fault_table(page)
    assert list(rows.values()) == ["1", "1", "1"]
    assert sum("gone/a.jpg" in row for row in rows) == 1


def test_an_unlisted_category_is_told(split, answers):
    file = split / ANNOTATION_FILE
    content = json.loads(file.read_text())
    content["annotations"] += [content["annotations"][1] | {"id": 50 + n, "category_id": 77} for n in range(2)]
    file.write_text(json.dumps(content))
    # Image 1 is left out with them, with its good label and its result: it may show anything.
    found = evaluate_predictions(answers, split, EvaluationSettings())
    assert counts(found.faults) == {
        "unknown_category": 2,
        "left_out_label": 1,
        "unclear_image": 1,
        "result_of_unclear_image": 1,
    }
    assert any("category 77" in note for note in found.to_dict()["notes"])
    assert found.num_images == 2
    assert "3 labels, 1 image and 1 result are left out" in check_page(render_validation_report([found]))


def test_results_that_are_left_out_are_told_beside_the_labels(split, answers, capsys):
    add_faults(split)
    good = json.loads(answers.read_text())
    answers.write_text(json.dumps([*good, good[0] | {"score": None}, good[1] | {"score": "high"}]))
    found = evaluate_predictions(answers, split, SKIP, progress=True)
    assert counts(found.faults) == FAULTS | {"bad_score": 2}
    printed = capsys.readouterr().out
    assert "1 label and 1 image are left out" in printed
    assert "2 results are left out" in printed
    page = render_validation_report([found])
    assert "1 label, 1 image and 2 results are left out" in check_page(page)
    box = page.split('<section class="faults">')[1].split("</section>")[0]
    assert re.findall(r'<th class="number">([^<]+)</th>', box) == ["valid", "mine.json"]


def test_a_clean_split_tells_nothing(split, answers, capsys):
    found = evaluate_predictions(answers, split, EvaluationSettings(), progress=True)
    assert capsys.readouterr().out == ""
    assert (found.faults, found.to_dict()["notes"]) == ([], found.notes)
    assert 'class="faults"' not in render_validation_report([found])


def test_counts_are_of_the_file_whatever_images_are_chosen(split, answers):
    add_faults(split)
    found = evaluate_predictions(answers, split, SKIP.changed(num_samples=1))
    assert (found.num_images, counts(found.faults)) == (1, FAULTS)


def test_a_missing_image_is_named_where_it_stops(split, answers):
    add_faults(split)
    with pytest.raises(UserError, match=r"gone/a\.jpg"):
        evaluate_predictions(answers, split, EvaluationSettings())


def test_a_model_that_is_asked(split, small_base, capsys):
    add_faults(split)
    found = evaluate(split, model=str(small_base), settings=SKIP, device="cpu", progress=True)
    assert counts(found.faults) == FAULTS
    assert capsys.readouterr().out.count("1 label and 1 image are left out") == 1
    # Where nothing is left to ask of, the faults say why.
    content = json.loads((split / ANNOTATION_FILE).read_text())
    content["annotations"] = content["annotations"][2:3]
    (split / ANNOTATION_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="object without any area"):
        evaluate(split, model=str(small_base), settings=SKIP, device="cpu")


def test_the_comparison_shows_them_once(split):
    add_faults(split)
    faults = split_faults("valid", CocoIndex.from_folder(split, on_bad_image="skip").faults)
    clean = write_split(split.parent / "clean", [(0, CRACK, 5)], NAMES)
    base, adapter = (
        measured(clean, [result(0, CRACK, 5, score)], label, faults=faults)
        for label, score in (("base", 0.4), ("mine", 0.9))
    )
    page = render_comparison_report(base, [adapter], {})
    check_page(page)
    assert page.count('class="faults"') == 1
    assert list(fault_table(page).values()) == ["1", "1", "1"]
