"""Results from a file: what is right, and what is refused."""

from __future__ import annotations

import json

import pytest

from sam3lora.errors import UserError
from sam3lora.evaluation.ask.predictions_file import evaluate_predictions
from sam3lora.evaluation.report.saving import save_validation
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
        # nothing in them can be read
        ([{"image_id": 0, "category_id": 1}], "none of its 1 results"),
        ([[], "text", 5], "none of its 3 results"),
        ([result(0, 1, 10, 0.9) | {"image_id": [0]}], "none of its 1 results"),
        ([result(0, 1, 10, float("nan"))], r"score .* nan"),
        ([result(0, 1, 10, 0.9) | {"segmentation": [[float("nan"), 10, 30, 10, 30, 30]]}], "cannot be pixels"),
        ([result(0, 1, 10, 0.9) | {"segmentation": {"size": [60, 80], "counts": "zz"}}], "run-length mask"),
        ([result(0, 1, 10, 0.9) | {"segmentation": None, "bbox": [10, 10, 20, 20]}], "without a mask"),
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


SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


@pytest.mark.parametrize(
    "spelling",
    [
        {"segmentation": SQUARE},
        {"segmentation": [SQUARE]},
        {"segmentation": [[[10, 10], [30, 10], [30, 30], [10, 30]]]},
        {"segmentation": [[10, 10], [30, 10], [30, 30], [10, 30]]},
        # a part that encloses nothing, beside one that does
        {"segmentation": [SQUARE, [1, 2, 3, 4]]},
        # far outside: what is in the image counts
        {"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30], [-1e9, -10, 1e9, -10, 1e9, -5, -1e9, -5]]},
        # a mask of another size is scaled
        {"segmentation": {"size": [120, 160], "counts": [20 * 120 + 20, *[40, 80] * 39, 40, 0]}},
        {"segmentation": [result(0, 1, 10, 1)["segmentation"]]},
        # boxes that cannot be read are taken from the mask
        {"bbox": [10, 10]},
        {"bbox": [float("nan")] * 4},
        {"bbox": None},
        # ids as texts or floats
        {"image_id": "0", "category_id": 1.0},
    ],
)
def test_results_are_read_like_labels(measure, spelling):
    entry = {key: value for key, value in result(0, 1, 10, 0.9).items() if key != "bbox"}
    if isinstance(spelling.get("segmentation"), dict):
        counts = spelling["segmentation"]["counts"]
        spelling["segmentation"]["counts"] = [*counts[:-1], 120 * 160 - sum(counts[:-1])]
    found = measure([entry | spelling, result(1, 2, 10, 0.9)])
    assert (found.map, found.bbox_map, found.num_predictions) == (pytest.approx(1), pytest.approx(1), 2)


def test_results_that_cannot_be_read_are_left_out_of_the_others(measure):
    broken = [
        {"segmentation": [[10, 10]]},
        {"segmentation": [[10, 10, 20, 20]]},
        {"segmentation": [[]]},
        {"score": None},
    ]
    entries = [result(0, 1, 10, 0.9), result(1, 2, 10, 0.9)]
    without_box = {key: value for key, value in entries[0].items() if key != "bbox"}
    found = measure(entries + [without_box | change for change in broken])
    assert (found.map, found.num_predictions) == (pytest.approx(1), 2)


def test_a_category_that_no_label_has_is_a_false_alarm(tmp_path):
    split = write_split(tmp_path / "valid", [(0, 1, 10), (1, 2, 10)], {1: "crack", 2: "hole", 3: "leaf"})
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([result(0, 1, 10, 0.9), result(1, 2, 10, 0.9), result(0, 3, 40, 0.9)]))
    found = evaluate_predictions(file, split, EvaluationSettings())
    assert found.map == pytest.approx(1)
    assert found.per_category["leaf"].off_prompt_fpr == 0.5


def test_ids_are_those_of_the_file_in_any_spelling(tmp_path):
    split = write_split(tmp_path / "valid", [(0, 1, 10), (1, 2, 10)], {1: "crack", 2: "hole"})
    source = split / "_annotations.coco.json"
    content = json.loads(source.read_text())
    texts = {0: "frame-a", 1: 2**70}
    for entry in content["images"]:
        entry["id"] = texts[entry["id"]]
    for entry in content["annotations"]:
        entry["image_id"] = texts[entry["image_id"]]
    source.write_text(json.dumps(content))
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps([result(0, 1, 10, 0.9) | {"image_id": "frame-a"}, result(1, 2, 10, 0.9) | {"image_id": 2**70}])
    )
    assert evaluate_predictions(file, split, EvaluationSettings()).map == pytest.approx(1)


def test_results_are_written_with_the_ids_of_the_file(tmp_path):
    split = write_split(tmp_path / "valid", [(0, 1, 10), (1, 2, 10)], {1: "crack", 2: "hole"})
    source = split / "_annotations.coco.json"
    content = json.loads(source.read_text())
    for entry in content["images"]:
        entry["id"] = f"00{entry['id']}"
    for entry in content["annotations"]:
        entry |= {"image_id": f"00{entry['image_id']}", "category_id": f"c{entry['category_id']}"}
    for entry in content["categories"]:
        entry["id"] = f"c{entry['id']}"
    source.write_text(json.dumps(content))
    entries = [result(i, i + 1, 10, 0.9) | {"image_id": f"00{i}", "category_id": f"c{i + 1}"} for i in range(2)]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(entries))
    found = evaluate_predictions(file, split, EvaluationSettings())
    assert found.map == pytest.approx(1)
    save_validation([found], tmp_path / "report")
    assert json.loads((tmp_path / "report/predictions.json").read_text()) == entries


def test_results_of_an_ambiguous_category_are_counted(tmp_path):
    split = write_split(tmp_path / "valid", [(0, 1, 10)], {1: "crack"})
    source = split / "_annotations.coco.json"
    content = json.loads(source.read_text())
    content["categories"] += [{"id": 2, "name": "hole"}, {"id": 2, "name": "leaf"}]
    source.write_text(json.dumps(content))
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([result(0, 1, 10, 0.9), result(0, 2, 40, 0.9), result(0, 1, 40, 1.5)]))
    found = evaluate_predictions(file, split, EvaluationSettings())
    counts = {fault["kind"]: fault["count"] for fault in found.faults if fault["split"] == "mine.json"}
    assert (found.num_predictions, counts) == (2, {"unknown_category": 1, "odd_score": 1})


def test_results_of_all_listings_of_a_file_count_once(tmp_path):
    split = write_split(tmp_path / "valid", [(0, 1, 10), (1, 1, 10)], {1: "crack"})
    source = split / "_annotations.coco.json"
    content = json.loads(source.read_text())
    content["images"].append(content["images"][0] | {"id": 99})
    source.write_text(json.dumps(content))
    file = tmp_path / "mine.json"
    entries = [result(0, 1, 10, 0.9), result(1, 1, 10, 0.8)]
    # the same for the other listing; twice for one listing is a duplicate of the program's own
    file.write_text(json.dumps([*entries, entries[0] | {"image_id": 99}, entries[1]]))
    found = evaluate_predictions(file, split, EvaluationSettings())
    assert (found.num_images, found.num_predictions, found.map) == (2, 3, pytest.approx(1))
