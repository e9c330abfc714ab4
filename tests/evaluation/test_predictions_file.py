"""Results from a file: what is right, and what is refused."""

from __future__ import annotations

import json

import pytest

from sam3lora.errors import UserError
from sam3lora.evaluation.ask.predictions_file import evaluate_predictions
from sam3lora.evaluation.settings import EvaluationSettings

from .splits import result, write_split


@pytest.fixture
def split(tmp_path):
    return write_split(tmp_path / "valid", [(0, 1, 10), (1, 2, 10)], {1: "crack", 2: "hole"})


@pytest.fixture
def measure(split, tmp_path):
    def run(content, **settings):
        file = tmp_path / "mine.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return evaluate_predictions(file, split, EvaluationSettings(**settings))

    return run


def test_a_file_is_measured_as_it_is(measure):
    # polygons are taken too, and duplicates are not suppressed
    polygon = result(1, 2, 10, 0.8) | {"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
    found = measure([result(0, 1, 10, 0.9), result(0, 1, 10, 0.7), polygon])
    assert found.map == pytest.approx(1)
    assert (found.label, found.num_predictions) == ("mine", 3)
    assert any("no presence" in note for note in found.notes)
    assert measure([]).map == 0


def test_images_beyond_num_samples_are_left_out(measure):
    assert measure([result(0, 1, 10, 0.9), result(1, 2, 10, 0.9)], num_samples=1).num_predictions == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [result(0, 1, 10, 0.9), result(5, 1, 10, 0.9)],
            r"entry 1 has image_id 5, .* predictions file of another split",
        ),
        ([result(0, 9, 10, 0.9)], "entry 0 has category_id 9"),
        ('[{"image_id": 0', "not valid JSON .* truncated"),
        ({"predictions": []}, "expected a list of COCO results, got dict"),
        ([{"image_id": 0, "category_id": 1}], "entry 0 lacks segmentation, score"),
        ([result(0, 1, 10, float("nan"))], "score nan"),
        ([result(0, 1, 10, 0.9) | {"segmentation": {"size": [4, 4], "counts": [16]}}], "60 x 80 .* got 4 x 4"),
        ([result(0, 1, 10, 0.9) | {"segmentation": {"size": [60, 80], "counts": "zz"}}], "damaged mask"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, content, message):
    with pytest.raises(UserError, match=message):
        measure(content)


def test_a_missing_file_is_named(split, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json"):
        evaluate_predictions(tmp_path / "nowhere.json", split, EvaluationSettings())


def test_results_of_a_run_with_prompts_that_no_image_shows(measure):
    # they have ids of their own, behind those of the file
    settings = {"negative_prompts": ("leaf",)}
    found = measure([result(0, 1, 10, 0.9), result(0, 3, 10, 0.9)], **settings)
    assert found.per_category["leaf"].off_prompt_fpr == 0.5
    with pytest.raises(UserError, match="category_id 3"):
        measure([result(0, 3, 10, 0.9)])
