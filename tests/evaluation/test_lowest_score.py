"""The floor for scores: what it leaves out, and when it is there; results measured again from their file."""

from __future__ import annotations

import json

import pytest

import sam3lora
from sam3lora.config.evaluation import EXACT_UP_TO_PAIRS, LOW_SCORE
from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.evaluation import predictions as predictions_module
from sam3lora.evaluation.ask.predictions_file import evaluate_predictions
from sam3lora.evaluation.predictions import Predictions, encode_results
from sam3lora.evaluation.settings import EvaluationSettings

from .report_cases import CRACK, HOLE, NAMES, measured
from .splits import result, write_split

TINY = {"model": "tiny", "device": "cpu", "nms_iou": 0.6}


def test_auto_is_exact_where_that_is_cheap():
    assert EvaluationSettings().score_floor(EXACT_UP_TO_PAIRS) == 0
    assert EvaluationSettings().score_floor(EXACT_UP_TO_PAIRS + 1) == LOW_SCORE
    # what is written holds for any size
    for number in (1, 10**6):
        assert EvaluationSettings(lowest_score=0.0).score_floor(number) == 0
        assert EvaluationSettings(lowest_score=0.02).score_floor(number) == 0.02


@pytest.mark.parametrize("wrong", [-0.1, 0.06, 1.0, float("nan")])
def test_a_floor_that_would_be_a_threshold_is_refused(wrong):
    with pytest.raises(UserError, match=r"lowest_score must be auto or between 0 and 0\.05"):
        EvaluationSettings(lowest_score=wrong)


@pytest.fixture(scope="module")
def exact(shapes):
    return sam3lora.evaluate(shapes, **TINY)


def lowest_of(metrics, share: float) -> float:
    scores = sorted(one["score"] for one in metrics.predictions)
    return min(0.05, scores[int(share * len(scores))])


def test_detections_below_the_floor_are_left_out_and_nothing_else_changes(exact, shapes):
    floor = lowest_of(exact, 0.5)
    found = sam3lora.evaluate(shapes, **TINY, lowest_score=floor)
    assert list(found.predictions) == [one for one in exact.predictions if one["score"] >= floor]
    assert 0 < len(found.predictions) < len(exact.predictions)
    assert (found.settings["lowest_score"], exact.settings["lowest_score"]) == (floor, 0)
    assert any(f"below {floor:g} are not measured" in note for note in found.notes)
    assert not any("not measured" in note for note in exact.notes)
    for name in ("cgf1", "off_prompt_fpr", "presence_accuracy", "num_detections", "num_ground_truth"):
        assert getattr(found, name) == getattr(exact, name), name


def test_a_threshold_below_the_floor_lowers_it(exact, shapes):
    floor = lowest_of(exact, 0.5)
    found = sam3lora.evaluate(shapes, **TINY, lowest_score=floor, threshold=floor / 2)
    assert found.settings["lowest_score"] == floor / 2
    assert found.num_detections == sum(one["score"] >= floor / 2 for one in exact.predictions)


def test_the_file_of_results_has_their_metrics(tmp_path):
    folder = write_split(tmp_path / "s", [(0, CRACK, 5), (0, CRACK, 50), (1, HOLE, 10)], NAMES, num_images=3)
    found = [result(0, CRACK, 6, 0.9), result(0, CRACK, 47, 0.4), result(1, HOLE, 40, 0.6), result(2, CRACK, 30, 0.001)]
    exact = measured(folder, found, post=PostProcessing())
    exact.predictions.write(tmp_path / "predictions.json")
    again = evaluate_predictions(tmp_path / "predictions.json", folder, EvaluationSettings())
    assert 0 < exact.map < 1
    for name in ("map", "map_50", "bbox_map", "mar_100", "cgf1", "il_mcc", "num_predictions", "num_detections"):
        assert getattr(again, name) == pytest.approx(getattr(exact, name), abs=1e-12), name


@pytest.mark.parametrize("in_memory_bytes", [10, 10**6])
def test_predictions_come_back_in_the_order_of_the_images(in_memory_bytes, monkeypatch, tmp_path):
    # on the disk or in memory; image 5 has none, and results arrive in another order
    monkeypatch.setattr(predictions_module, "_IN_MEMORY_BYTES", in_memory_bytes)
    results = {
        image: [result(image, 1, 10, 0.25 * n) for n in range(1, count + 1)] for image, count in ((9, 2), (2, 1))
    }
    kept = Predictions([9, 5, 2])
    for image in (2, 5, 9):
        kept.add(encode_results(results.get(image, []), [image]))
    expected = results[9] + results[2]
    assert (list(kept), len(kept), kept.of_image(2), kept.of_image(5)) == (expected, 3, results[2], [])
    kept.write(tmp_path / "predictions.json")
    assert (tmp_path / "predictions.json").read_text() == json.dumps(expected) + "\n"
    empty = Predictions([])
    empty.write(tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text()) == []
