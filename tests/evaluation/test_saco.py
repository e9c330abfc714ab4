"""Units of SA-Co files and of a split: what counts, what is left out, and how a wrong file is refused."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest

from sam3lora.data.coco import CocoIndex
from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.cgf1 import accumulate, count_unit
from sam3lora.evaluation.metrics.cgf1_units import collect_units, count_units
from sam3lora.evaluation.metrics.ground_truth import SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.measure import measure_split
from sam3lora.evaluation.metrics.saco import evaluate_saco
from sam3lora.evaluation.split_results import SplitResults

from .splits import hit, rle, truth

BOX = [0, 0, 0.5, 0.5]


def saco(objects=(), images=(1, 2), not_exhaustive=()) -> dict:
    """An SA-Co file of one phrase; objects are (image id, segmentation) and optionally more keys."""
    found = truth([(i, 1, s, {"bbox": BOX} | dict(*more)) for i, s, *more in objects], images, ("", "object"))
    for image in found["images"]:
        image |= {"text_input": "x", "is_instance_exhaustive": int(image["id"] not in not_exhaustive)}
    return found | {"categories": found["categories"][1:]}


def answer(image: int, segmentation: dict, score: float = 0.9, category: int = 1) -> dict:
    return hit(image, category, segmentation, score) | {"bbox": BOX}


@pytest.fixture
def evaluate(tmp_path):
    """(predictions, ground truth of each annotator) -> result; text is written as it is."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def run(predictions, *ground_truths, iou_type="segm"):
        files = [write(f"gt_{number}.json", content) for number, content in enumerate(ground_truths)]
        return evaluate_saco(files, write("pred.json", predictions), iou_type)

    return run


def test_perfect_masks_and_boxes(evaluate):
    ground_truth = saco([(1, rle(2, 2))])
    assert evaluate([], saco(images=())).counts()["units_evaluated"] == 0
    assert evaluate([answer(1, rle(2, 2))], ground_truth).metrics()["cgF1"] > 0.999
    # the boxes are equal, whatever the masks are
    assert evaluate([answer(1, rle(15, 2))], ground_truth).metrics()["cgF1"] == 0
    assert evaluate([answer(1, rle(15, 2))], ground_truth, iou_type="bbox").metrics()["cgF1"] > 0.999


def test_other_categories_are_dropped(evaluate):
    # neither an object to find nor a false positive
    ground_truth = saco([(1, rle(2, 2)), (1, rle(15, 2, 4), {"category_id": 7})])
    counts = evaluate([answer(1, rle(2, 2)), answer(2, rle(2, 2), category=7)], ground_truth).counts()
    assert (counts["TPs"][0], counts["FPs"][0], counts["FNs"][0], counts["IL_TN"]) == (1, 0, 0, 1)


def test_crowds_and_images_not_exhaustive_are_left_out(evaluate):
    # the crowd of image 1 is no target, and a detection in it is wrong; image 2 does not count at all
    ground_truth = saco([(1, rle(2, 2), {"iscrowd": 1}), (2, rle(2, 2))], not_exhaustive=[2])
    counts = evaluate([answer(1, rle(2, 2)), answer(2, rle(15, 2, 3))], ground_truth).counts()
    assert (counts["units_evaluated"], counts["IL_FP"], counts["FPs"][0], counts["FNs"][0]) == (1, 1, 1, 0)


def test_annotators(evaluate):
    # image 1: the second annotator agrees; image 2 is exhaustive for one of them only
    first = saco([(1, rle(15, 2)), (2, rle(2, 2))])
    second = saco([(1, rle(2, 2))], not_exhaustive=[2])
    counts = evaluate([answer(1, rle(2, 2))], first, second).counts()
    assert (counts["units_evaluated"], counts["TPs"], counts["FPs"]) == (1, [1] * 10, [0] * 10)


TRUTH = saco([(1, rle(2, 2))])


@pytest.mark.parametrize(
    ("predictions", "ground_truths", "message"),
    [
        ("[{", [TRUTH], "pred.json is not valid JSON"),
        ([], [json.dumps(TRUTH)[:-9]], "gt_0.json is not valid JSON"),
        ({}, [TRUTH], "expected a list"),
        ([], [[]], "without images, annotations, categories"),
        ([], [{"images": [], "annotations": []}], "without categories"),
        ([], [TRUTH | {"images": [{"id": 1, "height": 60, "width": 60}]}], r"images\[0\] lacks is_instance_exhaustive"),
        ([], [TRUTH | {"images": TRUTH["images"] * 2}], "4 images with 2 ids"),
        ([], [saco([(5, rle(2, 2))])], "image_id 5, which its images lack"),
        ([], [TRUTH, saco(images=(1, 3))], r"different images \(2 in one only"),
        ([], [], "no ground-truth file"),
        ([{"image_id": 1, "category_id": 1, "score": 1}], [TRUTH], r"predictions\[0\] lacks segmentation"),
        (
            [answer(1, rle(2, 2, 5)), answer(9, rle(2, 2, 5))],
            [TRUTH],
            "another split: .* lacks 1 of .*, 9 for",
        ),
        ([answer("1", rle(2, 2, 5))], [TRUTH], "image_id '1': expected an integer"),
        ([answer(1, rle(2, 2, 5), score=float("nan"))], [TRUTH], "score nan"),
        ([answer(1, rle(2, 2, 5, (60, 40)))], [TRUTH], "mask of 60 x 40 pixels, its image has 60 x 60"),
        ([answer(1, rle(2, 2, 5) | {"counts": "!"})], [TRUTH], r"predictions\[0\] has a damaged mask"),
        ([answer(1, [[0, 0, 5, 0, 5, 5]])], [TRUTH], "as a compressed RLE, got list"),
    ],
)
def test_wrong_files_are_refused(evaluate, predictions, ground_truths, message):
    with pytest.raises(UserError, match=message):
        evaluate(predictions, *ground_truths)


def test_wrong_boxes_and_missing_files_are_refused(evaluate, tmp_path):
    with pytest.raises(UserError, match=r"expected \[x, y, width, height\]"):
        evaluate([answer(1, rle(2, 2, 5)) | {"bbox": [0, 0, 1]}], TRUTH, iou_type="bbox")
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json"):
        evaluate_saco([tmp_path / "nowhere.json"], tmp_path / "pred.json")


def units_of(objects=(), hits=(), images=1, categories=2, iou_type="segm"):
    """Units of a split; objects are (image, category, segmentation, more keys), hits (image, category, COCO result)."""
    annotations = [
        {"image": i, "category": c, "segmentation": s, "bbox": [0, 0, 15, 15], "iscrowd": 0} | dict(*more)
        for i, c, s, *more in objects
    ]
    by_pair = defaultdict(list)
    for image, category, result in sorted(hits, key=lambda entry: -entry[2]["score"]):
        by_pair[image, category].append(result)
    return collect_units(annotations, by_pair, (images, categories), iou_type=iou_type)


def cgf1_of(units, threshold=0.5):
    return count_units(units, threshold).overall()


def test_split_without_images_and_without_objects():
    assert cgf1_of(units_of(images=0)).counts()["units_evaluated"] == 0
    # every category in every image is a unit
    assert cgf1_of(units_of(images=2)).counts()["IL_TN"] == 4


def test_split_units_hold_sorted_detections_above_the_floor():
    hits = [(0, 0, answer(1, rle(15, 2, 5), 0.3)), (0, 0, answer(1, rle(2, 2), 0.7))]
    hits += [(0, c, answer(1, rle(0, 0, 3), 0.049)) for c in (0, 1)]
    units = units_of([(0, 0, rle(2, 2)), (0, 0, rle(15, 2, 5))], hits)
    assert units.of(0, 0).scores_D.tolist() == [0.7, 0.3]
    assert units.of(0, 0).iou_DT.tolist() == [[1, 0], [0, 1]]
    assert units.of(0, 1).scores_D.tolist() == []
    assert cgf1_of(units).counts()["TPs"][0] == 1
    assert cgf1_of(units, 0.3).counts()["TPs"][0] == 2
    with pytest.raises(ValueError, match=r"at least 0\.05"):
        cgf1_of(units, 0.01)


def test_split_crowds():
    # category 0: an object beside a crowd, which is no target. 1: a crowd only. 2: an object and one without mask. The
    # last two cannot be judged.
    crowd = (rle(15, 2), {"iscrowd": 1})
    without_mask = (rle(15, 2), {"iscrowd": 1, "is_box_only": 1})
    objects = [(0, 0, rle(2, 2)), (0, 0, *crowd), (0, 1, *crowd), (0, 2, rle(2, 2)), (0, 2, *without_mask)]
    units = units_of(objects, [(0, 1, answer(1, rle(15, 2)))], categories=3)
    assert units.of(0, 0).iou_DT.shape == (0, 1)
    assert cgf1_of(units).counts()["units_evaluated"] == 1
    for category in (1, 2):
        with pytest.raises(KeyError):
            units.of(0, category)


def test_split_categories_and_boxes():
    hits = [(0, 0, answer(1, rle(2, 2)) | {"bbox": [0, 0, 15, 15]}), (0, 1, answer(1, rle(2, 2)))]
    units = units_of([(0, 0, rle(2, 2))], hits, iou_type="bbox")
    assert cgf1_of(units).counts()["IL_FP"] == 1
    assert cgf1_of(units).counts()["TPs"] == [1] * 10


def test_annotations_as_predictions_are_perfect(shapes):
    # the whole way from a folder; "unicorn" is in no image, so there are negatives
    index = CocoIndex.from_folder(shapes / "valid")
    truth = SplitTruth(index, prompted_categories(index, [*index.names, "unicorn"]))
    perfect = [annotation | {"score": 1.0} for annotation in truth.annotations()]
    counts = cgf1_of(measure_split(truth, SplitResults(perfect)).matches.units).counts()
    assert counts["TPs"] == [len(perfect)] * 10
    assert (counts["FPs"], counts["FNs"], counts["IL_FP"], counts["IL_FN"]) == ([0] * 10, [0] * 10, 0, 0)
    assert measure_split(truth, SplitResults(perfect)).cgf1 > 0.999


def test_sums_of_groups_are_those_of_units():
    # by image and by category, with false alarms, misses and quiet units
    rng = np.random.default_rng(0)
    objects, hits = [], []
    for image in range(6):
        for category in range(3):
            for _ in range(rng.integers(0, 3)):
                x, y = (int(value) for value in rng.integers(0, 20, 2))
                objects.append((image, category, rle(x, y)))
                hits.append((image, category, answer(1, rle(x + int(rng.integers(0, 4)), y), float(rng.random()))))
            if rng.random() < 0.5:
                hits.append((image, category, answer(1, rle(1, 1), float(rng.random()))))
    units = units_of(objects, hits, images=6, categories=3)
    counts = count_units(units, 0.3)
    by_hand = {(i, c): count_unit(units.of(i, c), 0.3) for i in range(6) for c in range(3)}
    for axis, size in ((0, 6), (1, 3)):
        sums = counts.sums(axis)
        for group in range(size):
            expected = vars(accumulate(entry for pair, entry in by_hand.items() if pair[axis] == group))
            for name, value in expected.items():
                np.testing.assert_allclose(sums[name][group], value, atol=1e-12)
    assert counts.overall().metrics() == pytest.approx(accumulate(by_hand.values()).metrics(), abs=1e-12)
