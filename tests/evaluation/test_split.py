"""What is asked about a split, what counts as its truth, and `sam3lora.evaluate` with a model."""

from __future__ import annotations

import numpy as np
import pytest

import sam3lora
from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.engine.detections import Detections
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory, SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.measure import measure_split
from sam3lora.evaluation.predictions import Predictions, encode_results
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.split_matches import ABSENT, ONLY_CROWDS, SHOWN, Matcher, SplitMatches
from sam3lora.evaluation.split_results import SplitResults

from .adapters import write_adapter
from .splits import result, write_split

CROWD = {"segmentation": {"size": [60, 80], "counts": [0, 600, 4200]}, "iscrowd": 1, "bbox": [0, 0, 10, 60]}
BOX_ONLY = {"segmentation": []}


@pytest.fixture
def index_of(tmp_path):
    return lambda objects, names, num_images=2: CocoIndex.from_folder(
        write_split(tmp_path / "s", objects, names, num_images)
    )


def test_categories_with_one_prompt_are_asked_once(index_of):
    index = index_of([(0, 3, 10), (0, 5, 10), (1, 7, 10)], {3: "Crack", 5: "fissure", 7: "hole"})
    asked = prompted_categories(index, prompts={"fissure": "crack"})
    assert [(c.id, c.name, c.prompt) for c in asked] == [(3, "Crack", "Crack"), (7, "hole", "hole")]
    # objects of both names are objects of the one prompt
    assert [a["category_id"] for a in SplitTruth(index, asked).annotations()] == [3, 3, 7]


def test_names_without_objects_get_ids_of_their_own_and_count_for_presence(index_of):
    index = index_of([(0, 3, 10), (1, 3, 10)], {3: "crack"})
    asked = prompted_categories(index, names=["leaf", "crack", "hole"])
    assert [(c.id, c.name) for c in asked] == [(4, "leaf"), (3, "crack"), (5, "hole")]
    presence = {(image, id_): score for image in (0, 1) for id_, score in ((3, 0.9), (4, 0.7), (5, 0.1))}
    found = measure_split(SplitTruth(index, asked), SplitResults([result(i, 3, 10, 0.9) for i in (0, 1)], presence))
    assert (found.map, found.per_category["leaf"].map) == (pytest.approx(1), None)
    assert found.presence_accuracy == pytest.approx(4 / 6)


def test_objects_without_mask_and_crowds_are_not_to_be_found(index_of):
    index = index_of([(0, 1, 10), (0, 1, 10, BOX_ONLY), (1, 1, 0, CROWD)], {1: "crack"})
    truth = SplitTruth(index, prompted_categories(index))
    annotations = list(truth.annotations())
    assert [a["iscrowd"] for a in annotations] == [0, 1, 1]
    # the box stands in for the mask
    assert annotations[1]["area"] == 400
    matches = measure_split(truth, SplitResults()).matches
    assert matches.num_without_mask == 1
    # image 1 shows a crowd only: neither present nor absent
    assert matches.shown_IC.tolist() == [[SHOWN], [ONLY_CROWDS]]


def test_an_object_is_shown_whether_a_crowd_comes_before_or_after_it(index_of):
    index = index_of([(0, 1, 10), (0, 1, 0, CROWD), (1, 1, 0, CROWD), (1, 1, 10)], {1: "crack"})
    truth = SplitTruth(index, prompted_categories(index))
    assert measure_split(truth, SplitResults()).matches.shown_IC.tolist() == [[SHOWN], [SHOWN]]


def test_presence_is_not_judged_where_only_a_crowd_is(index_of):
    index = index_of([(0, 1, 0, CROWD)], {1: "crack"})
    absent = {(0, 1): 0.1, (1, 1): 0.1}
    truth = SplitTruth(index, prompted_categories(index))
    # absent from image 1, as the model says; image 0 is not counted although the model says absent there
    assert measure_split(truth, SplitResults(presence=absent)).presence_accuracy == 1
    truth = SplitTruth(index.select_rows([0]), prompted_categories(index))
    found = measure_split(truth, SplitResults(presence={(0, 1): 0.1}))
    assert found.presence_accuracy is None
    assert any("presence_accuracy is null" in note for note in found.notes)


def test_nothing_to_find_is_none_with_a_reason(index_of):
    index = index_of([(0, 1, 10, BOX_ONLY)], {1: "crack"}, 1)
    truth = SplitTruth(index, prompted_categories(index))
    found = measure_split(truth, SplitResults([result(0, 1, 10, 0.9)], {(0, 1): 0.9}))
    assert (found.map, found.presence_accuracy) == (None, 1)
    assert any("map is null" in note for note in found.notes)
    assert any("1 object(s) have a box and no mask" in note for note in found.notes)


def test_results_are_collected_and_joined_in_the_order_of_the_images():
    crack = PromptedCategory(1, "crack", "crack")

    def part(image: int, score: float, num_before_nms: int) -> SplitResults:
        scores, boxes = np.array([score], np.float32), np.array([[10, 10, 30, 35]], np.float32)
        mask = result(image, 1, 10, score)["segmentation"]
        found = Detections("crack", 0.9, (60, 80), scores, boxes, [mask], num_before_nms=num_before_nms)
        return SplitResults.collect([{"image_id": image}], [crack], [[found]])

    crack.name_keys.add("crack")
    matcher, predictions = Matcher([crack], PostProcessing()), Predictions([7, 0])
    parts = []
    for image, results in ((0, part(0, 0.25, 2)), (7, part(7, 0.5, 3))):
        mask = {"bbox_xywh": [10, 10, 20, 20], "iscrowd": False, "segmentation": "[[10,10,30,10,30,30,10,30]]"}
        annotations = [mask | {"category": "crack"}] if image else []
        parts.append(
            matcher.match([{"image_id": image, "height": 60, "width": 80, "annotations": annotations}], results)
        )
        predictions.add(encode_results(results.predictions, [image]))
    joined = SplitMatches.join(parts, [7, 0], 1)
    # in the order asked for, and not in that of arrival or of ids
    assert [(p["image_id"], p["category_id"], p["score"]) for p in predictions] == [(7, 1, 0.5), (0, 1, 0.25)]
    assert next(iter(predictions))["bbox"] == [10, 10, 20, 25]
    assert (len(predictions), joined.num_predictions, joined.num_before_nms, joined.num_detections) == (2, 2, 5, 1)
    assert joined.shown_IC.tolist() == [[SHOWN], [ABSENT]]
    assert joined.presence_IC.tolist() == [[0.9], [0.9]]
    # the unit with an object is that of the first image, the alarm that of the second
    assert joined.units.pairs_P2.tolist() == [[0, 0]]
    assert joined.units.alarm_pairs_D2.tolist() == [[1, 0]]
    assert joined.table.best_score_IC.tolist() == [[0.5], [0.25]]
    assert joined.units.of(0, 0).iou_DT.tolist() == [[1]]
    assert joined.units.of(1, 0).scores_D.tolist() == [0.25]


def test_batch_size_does_not_matter(small_base, shapes):
    one, four = (
        sam3lora.evaluate(
            shapes,
            model=str(small_base),
            device="cpu",
            nms="none",
            settings=EvaluationSettings(batch_size=size, max_prompts_per_forward=prompts),
        )
        for size, prompts in ((1, 2), (4, 16))
    )
    assert len(one.predictions) == len(four.predictions) == 4 * len(one.per_category) * 8
    np.testing.assert_allclose([p["score"] for p in one.predictions], [p["score"] for p in four.predictions], atol=1e-5)
    assert one.presence_accuracy == four.presence_accuracy


def test_evaluate_asks_and_counts_as_the_adapter_was_trained(small_base, shapes, tmp_path):
    # the adapter changes nothing, so what differs from the base is the setting that came from its metadata
    write_adapter(tmp_path / "cls", small_base, seed=None, geometry_cls=False)
    model = {"model": str(small_base), "device": "cpu", "nms": "none"}
    adapter = sam3lora.evaluate(shapes, adapter=tmp_path / "cls", device="cpu", nms="none")
    plain, with_cls = (sam3lora.evaluate(shapes, geometry_cls=cls, **model) for cls in (False, True))
    scores = [[p["score"] for p in metrics.predictions] for metrics in (adapter, plain, with_cls)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert np.abs(np.subtract(scores[0], scores[2])).max() > 1e-4

    split = write_split(tmp_path / "s", [(0, 1, 10)], {1: "crk"})
    post = PostProcessing(threshold=0.45, nms_iou=0.6, max_detections=3)
    data = {"prompt_of_category": {"crk": "crack in a wall"}}
    write_adapter(tmp_path / "post", small_base, seed=None, post_processing=post, data=data)
    found = sam3lora.evaluate(split, adapter=tmp_path / "post", device="cpu")
    assert (found.settings["threshold"], found.settings["nms_iou"]) == (0.45, 0.6)
    assert found.settings["prompts"] == {"crk": "crack in a wall"}
    assert found.num_predictions <= 2 * 3
