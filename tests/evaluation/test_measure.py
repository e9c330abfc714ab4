"""Numbers of a split that can be worked out on paper."""

from __future__ import annotations

import json

import pytest

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.ground_truth import SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.measure import measure_split
from sam3lora.evaluation.split_results import SplitResults

from .splits import result, write_split

CRACK, HOLE = 1, 2
NAMES = {CRACK: "crack", HOLE: "hole"}


def truth_of(folder, objects, num_images=2, names=("crack", "hole")):
    index = CocoIndex.from_folder(write_split(folder, objects, NAMES, num_images))
    return SplitTruth(index, prompted_categories(index, names))


@pytest.fixture
def truth(tmp_path):
    """Image 0 holds two cracks, image 1 a hole; image 2 is empty."""
    return truth_of(tmp_path / "s", [(0, CRACK, 10), (0, CRACK, 40), (1, HOLE, 10)], num_images=3)


def presence(**above):
    return {(image, category): above.get(f"p{image}{category}", 0.1) for image in range(3) for category in NAMES}


def test_nothing_found(truth):
    found = measure_split(truth, SplitResults(presence=presence()))
    assert (found.map, found.mar_100, found.num_predictions, found.num_detections) == (0, 0, 0, 0)
    assert (found.cgf1, found.il_mcc, found.positive_micro_f1) == (0, 0, 0)
    # nothing is ever claimed: right about the four absent pairs, wrong about the two present ones
    assert found.off_prompt_fpr == 0
    assert found.presence_accuracy == pytest.approx(4 / 6)
    assert (found.presence_accuracy_absent, found.num_absent_prompts) == (1, 4)


def test_by_hand(truth):
    predictions = [
        result(0, CRACK, 10, 0.9),
        result(0, CRACK, 40, 0.4),  # right, and above the threshold 0.3, but below cgF1's 0.5
        result(1, HOLE, 60, 0.8),  # beside the hole
        result(2, CRACK, 10, 0.35),  # a false alarm at 0.3, none at 0.5
        result(2, HOLE, 10, 0.1),
    ]
    results = SplitResults(predictions, presence(p01=0.9, p12=0.9, p21=0.6), num_before_nms=9)
    found = measure_split(truth, results, post=PostProcessing(threshold=0.3))
    assert (found.num_predictions, found.num_predictions_before_nms, found.num_detections) == (5, 9, 4)
    assert found.per_category["crack"].map == pytest.approx(1)
    assert found.per_category["hole"].map == 0
    assert found.map == pytest.approx(0.5)
    # absent pairs: (0, hole), (1, crack), (2, crack), (2, hole); one fires at 0.3
    assert found.off_prompt_fpr == 0.25
    assert found.per_category["crack"].off_prompt_fpr == 0.5
    assert found.per_category["hole"].off_prompt_fpr == 0
    assert found.presence_accuracy == pytest.approx(5 / 6)
    assert found.presence_accuracy_absent == 0.75
    # at 0.5: image level right everywhere; 1 of 2 detections right, 1 of 3 objects found
    assert found.il_mcc == pytest.approx(1, abs=1e-5)
    assert found.cgf1 == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3), abs=1e-3)
    json.dumps([found.to_dict(), list(found.predictions)])


def test_the_threshold_moves_counts_and_not_map(truth):
    predictions = [result(0, CRACK, 10, 0.9), result(2, CRACK, 10, 0.35)]
    low, high = (measure_split(truth, SplitResults(predictions), post=PostProcessing(threshold=t)) for t in (0.3, 0.5))
    assert low.map == high.map > 0
    assert (low.off_prompt_fpr, high.off_prompt_fpr) == (0.25, 0)
    assert (low.num_detections, high.num_detections) == (2, 1)


def test_absence_that_is_not_annotated_is_not_judged(truth):
    predictions = [result(0, CRACK, 10, 0.9), result(0, CRACK, 40, 0.8), result(2, CRACK, 10, 0.99)]
    found = measure_split(truth, SplitResults(predictions, presence()), exhaustive=False)
    # the detection in image 2 may be right for all that is known
    assert found.per_category["crack"].map == pytest.approx(1)
    assert found.off_prompt_fpr is found.cgf1 is found.il_mcc is found.presence_accuracy_absent is found.sweep is None
    assert any("off_prompt_fpr is null" in note for note in found.notes)
    assert any("cgf1 and il_mcc are null: absence is not annotated" in note for note in found.notes)


def test_absence_of_some_categories_is_known(truth):
    # Cracks are all annotated, holes are not: the hole in image 2 may be there, that in image 1 is.
    predictions = [
        result(0, CRACK, 10, 0.9),
        result(0, CRACK, 40, 0.8),
        result(2, CRACK, 10, 0.7),
        result(1, HOLE, 10, 0.9),
        result(2, HOLE, 10, 0.99),
    ]
    claimed = presence(p01=0.9, p12=0.9, p21=0.9, p22=0.9)
    found = measure_split(truth, SplitResults(predictions, claimed), exhaustive=("Crack",))
    assert found.per_category["hole"].map == pytest.approx(1)
    # cracks: one of two images without one has a false alarm; presence is right in images 0 and 1, and for the hole
    assert (found.off_prompt_fpr, found.num_absent_prompts) == (0.5, 2)
    assert found.presence_accuracy == 3 / 4
    assert found.presence_accuracy_absent == 0.5
    hole = found.per_category["hole"]
    assert hole.off_prompt_fpr is hole.cgf1 is hole.best_threshold is None
    # nothing else is different from a split without holes
    only_cracks = SplitTruth(truth.index, truth.categories[:1])
    cracks = SplitResults([p for p in predictions if p["category_id"] == CRACK])
    alone = measure_split(only_cracks, cracks)
    for name in ("cgf1", "il_mcc", "positive_micro_f1"):
        assert getattr(found, name) == getattr(alone, name) is not None
    assert found.sweep.cgf1 == alone.sweep.cgf1
    assert any("not annotated exhaustively" in note and "hole" in note for note in found.notes)
    assert sum(found.curves.best_scores.wrong) == 2


def test_negative_prompts_are_known_to_be_absent(tmp_path):
    # No category is annotated exhaustively; false alarms are those for the word that no image shows.
    truth = truth_of(tmp_path / "s", [(0, CRACK, 10)], names=("crack", "zebra"))
    zebra = truth.categories[1].id
    results = SplitResults([result(0, CRACK, 10, 0.9), result(1, CRACK, 10, 0.9), result(1, zebra, 10, 0.9)])
    found = measure_split(truth, results, exhaustive=False, negative_prompts=("Zebra",))
    assert found.off_prompt_fpr == found.per_category["zebra"].off_prompt_fpr == 0.5
    assert found.per_category["crack"].off_prompt_fpr is None


def test_every_category_in_every_image_has_no_cgf1(tmp_path):
    truth = truth_of(tmp_path / "s", [(0, CRACK, 10), (0, HOLE, 40)], num_images=1)
    found = measure_split(truth, SplitResults([result(0, CRACK, 10, 0.9)]))
    assert found.cgf1 is None
    assert found.positive_micro_f1 == pytest.approx(2 * 1 * 0.5 / 1.5, abs=1e-3)
    assert any("cgf1 and il_mcc are null" in note for note in found.notes)
    assert any("off_prompt_fpr is null: every image shows every category" in note for note in found.notes)


def test_answers_to_other_images_are_refused(truth):
    with pytest.raises(UserError, match="another split"):
        measure_split(truth, SplitResults([result(7, CRACK, 10, 0.9)]))


def test_objects_without_mask_leave_their_image_out_of_cgf1(tmp_path):
    # a crack with a mask beside one with a box alone: finding both is right, and says nothing to cgF1
    objects = [(0, CRACK, 10), (0, CRACK, 40, {"segmentation": []}), (1, CRACK, 10)]
    truth = truth_of(tmp_path / "s", objects, 3, ["crack"])
    predictions = [result(0, CRACK, 10, 0.9), result(0, CRACK, 40, 0.9), result(1, CRACK, 10, 0.9)]
    found = measure_split(truth, SplitResults(predictions))
    assert found.map == pytest.approx(1)
    assert found.positive_micro_f1 == pytest.approx(1, abs=1e-3)
    assert (found.num_ground_truth, found.bbox_map) == (2, pytest.approx(1))
    # its box alone is enough for box mAP
    assert measure_split(truth, SplitResults(predictions[::2])).bbox_map < 1


def test_thresholds_below_the_usual_floor_count_everything(truth):
    found = measure_split(truth, SplitResults([result(2, CRACK, 10, 0.02)]), post=PostProcessing(threshold=0.01))
    assert found.off_prompt_fpr == 0.25
    assert len(found.matches.units.of(2, 0).scores_D) == 1
