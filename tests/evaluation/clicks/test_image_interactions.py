"""Simulated users and a click head that is told what to answer: prompts, values, and the masks to be shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.prompts import prompt_key
from sam3lora.data.rle import encode_rle
from sam3lora.engine.clicks.interaction import Interaction, Seed
from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
from sam3lora.engine.clicks.prompt import drawn_mask_logits
from sam3lora.engine.mask_codes import rle_area_px
from sam3lora.engine.selection import NotFiniteError, SmallDetections, Wanted
from sam3lora.evaluation.clicks.asking import ImageInteractions
from sam3lora.evaluation.clicks.seeds import found_objects
from sam3lora.evaluation.clicks.simulated_user import SimulatedUser, run_objects
from sam3lora.evaluation.clicks.true_objects import TrueObject, true_objects
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory

from .click_cases import SIDE, clicking, square

NOTHING = Interaction((SIDE, SIDE), SIDE)
CATEGORIES = [
    PromptedCategory(1, "gear", "a gear", {prompt_key("gear")}),
    PromptedCategory(2, "bolt", "bolt", {prompt_key("bolt")}),
]


def test_the_values_of_a_mask_that_gets_better():
    truth = square(10, 10, 20)
    half = truth & (np.arange(SIDE) < 20)
    asked = []

    def masks_of(prompt):
        asked.append(prompt)
        return [truth, truth, half] if prompt.multimask else [truth]

    interactions = ImageInteractions(clicking(masks_of), [NOTHING])
    [run] = run_objects([SimulatedUser(encode_rle(truth), max_clicks=5)], interactions.answer)
    assert run.ious.tolist() == [0, 0.5, 1, 1, 1, 1]  # the chosen mask, not the best; then nothing is left to click on
    assert run.oracle_iou == 1
    assert run.score_error == pytest.approx(0.4)
    assert len(run.clicks) == 2
    assert [len(prompt.points_k2) for prompt in asked] == [1, 2]
    # the second prompt repeats the first click, and shows the chosen mask
    np.testing.assert_array_equal(asked[1].points_k2[0], asked[0].points_k2[0])
    assert torch.equal(asked[1].mask_mm > 0, torch.from_numpy(half))
    # after 1 click the half, after 3 and 8 what 2 clicks led to
    shown = {count: coco_mask.decode(found).astype(bool) for count, found in interactions.shown[0].items()}
    assert list(shown) == [1, 3, 8]
    assert np.array_equal(shown[1], half)
    assert np.array_equal(shown[3], truth)
    assert np.array_equal(shown[8], truth)


def test_users_are_answered_together_and_apart():
    truths = [square(4, 4, 10), square(30, 30, 20)]
    calls = []

    def ask(prompts):
        calls.append(len(prompts))
        return clicking(lambda prompt: [truths[int(prompt.points_k2[0, 0] > 20)]])(prompts)

    users = [SimulatedUser(encode_rle(one), max_clicks=3) for one in truths]
    runs = run_objects(users, ImageInteractions(ask, [NOTHING] * 2).answer)
    assert calls == [2]
    assert [run.ious.tolist() for run in runs] == [[0, 1, 1, 1]] * 2


@pytest.mark.parametrize("kind", ["mask", "box", "both"])
def test_a_seed_goes_with_the_first_click(kind):
    truth, found = square(10, 10, 20), square(10, 10, 18)
    asked = []

    def masks_of(prompt):
        asked.append(prompt)
        return [found]

    start = Interaction((SIDE, SIDE), SIDE, Seed(drawn_mask_logits(found, SIDE), (10, 10, 28, 28), kind))
    user = SimulatedUser(encode_rle(truth), found=encode_rle(found), max_clicks=2)
    [run] = run_objects([user], ImageInteractions(clicking(masks_of), [start]).answer)
    assert run.ious == pytest.approx([324 / 400] * 3)
    assert not asked[0].multimask
    assert (asked[0].mask_mm is not None) == (kind != "box")
    assert (None if asked[0].box_xyxy is None else asked[0].box_xyxy.tolist()) == (
        None if kind == "mask" else [10, 10, 28, 28]
    )
    assert asked[1].mask_mm is not None


def test_what_has_no_answer_stops():
    broken = ImageInteractions(lambda prompts: [NotFiniteError("NaN")] * len(prompts), [NOTHING])
    with pytest.raises(NotFiniteError):
        run_objects([SimulatedUser(encode_rle(square(10, 10, 20)))], broken.answer)


def detections(*masks: np.ndarray, prompt: str = "a gear") -> SmallDetections:
    """With boxes that are 2 pixels larger than the masks on each side."""
    wanted = Wanted(prompt, (SIDE, SIDE), PostProcessing())
    boxes = []
    for mask in masks:
        ys, xs = np.nonzero(mask) if mask.any() else ([0], [0])
        x0, y0, x1, y1 = min(xs) - 2, min(ys) - 2, max(xs) + 3, max(ys) + 3
        boxes.append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    return SmallDetections(
        wanted,
        1.0,
        np.linspace(0.9, 0.6, len(masks), dtype=np.float32),
        np.array(boxes, np.float32).reshape(-1, 4) / SIDE,
        np.stack([drawn_mask_logits(mask, SIDE).numpy() for mask in masks]) if masks else np.zeros((0, SIDE, SIDE)),
        np.zeros(len(masks), bool),
    )


def true_object(mask: np.ndarray, category: int = 0) -> TrueObject:
    return TrueObject(0, CATEGORIES[category], encode_rle(mask))


def test_objects_are_matched_one_to_one_with_the_detections_of_their_prompt():
    left, right = square(4, 4, 20), square(34, 34, 20)
    objects = [true_object(left), true_object(right), true_object(left, category=1)]
    # nothing; half of the left one and as much beside it; the left one nearly; the right one shifted
    empty, poor, good, moved = np.zeros_like(left), square(14, 4, 20), square(4, 4, 19), square(36, 34, 20)
    found = found_objects(objects, {"a gear": detections(empty, poor, good, moved)}, "both")
    assert np.array_equal(coco_mask.decode(found[0].rle), good)
    assert np.array_equal(coco_mask.decode(found[1].rle), moved)
    assert found[0].seed.box_xyxy == pytest.approx((2, 2, 25, 25))  # of the detection, not of its mask
    assert found[1].seed.box_xyxy == pytest.approx((34, 32, 58, 56))
    assert torch.equal(found[0].seed.mask_mm > 0, torch.from_numpy(good))
    assert found[0].seed.kind == "both"
    assert found[2] is None  # its prompt was not asked


def test_an_object_is_found_from_half_an_overlap_on():
    truth = square(0, 0, 20)
    half, less = truth & (np.arange(SIDE) < 10), truth & (np.arange(SIDE) < 9)
    assert found_objects([true_object(truth)], {"a gear": detections(half)}, "box")[0] is not None
    assert found_objects([true_object(truth)], {"a gear": detections(less)}, "box") == [None]
    assert found_objects([true_object(truth)], {"a gear": detections()}, "box") == [None]
    # one detection of two objects starts one of them
    twice = found_objects([true_object(truth), true_object(half)], {"a gear": detections(truth)}, "box")
    assert [one is not None for one in twice] == [True, False]


def annotation(category: str, mask: np.ndarray | None, iscrowd: int = 0) -> dict:
    segmentation = None if mask is None else encode_rle(mask)
    return {"category": category, "segmentation": segmentation, "iscrowd": iscrowd, "bbox_xywh": [0, 0, 5, 5]}


def test_what_is_clicked_on():
    record = {
        "height": SIDE,
        "width": SIDE,
        "annotations": [
            annotation("gear", square(4, 4, 10)),
            annotation("bolt", None),  # a box alone
            annotation("leaf", square(40, 4, 10)),  # not asked
            annotation("gear", square(30, 30, 20), iscrowd=1),
            annotation("leaf", square(0, 60, 4), iscrowd=1),  # a crowd of what is not asked is ignored too
            annotation("gear", square(32, 32, 5)),  # within the crowd
            annotation("Gear", square(20, 20, 15)),  # a part of it is
        ],
    }
    found = true_objects(record, CATEGORIES)
    assert [(one.number, one.category.name) for one in found.objects] == [(0, "gear"), (6, "gear")]
    assert np.array_equal(coco_mask.decode(found.objects[1].rle), square(20, 20, 15))
    assert np.array_equal(coco_mask.decode(found.ignored), square(30, 30, 20) | square(0, 60, 4))
    assert found.too_small == [5]
    assert (found.num_without_mask, found.num_crowds) == (1, 2)


def test_too_small_an_object():
    size = 200  # an object needs 4 pixels
    masks = [np.zeros((size, size), bool) for _ in range(2)]
    masks[0][0, :3] = masks[1][0, :4] = True
    record = {"height": size, "width": size, "annotations": [annotation("gear", mask) for mask in masks]}
    found = true_objects(record, CATEGORIES)
    assert found.too_small == [0]
    assert [one.number for one in found.objects] == [1]


def test_users_see_cleaned_masks_and_the_head_its_own():
    """A speck of 4 pixels that would take the second click, and a hole of 4 that would take the third."""
    truth = square(10, 10, 20)
    noisy = truth & ~square(18, 18, 2) | square(50, 50, 2)
    asked = []

    def masks_of(prompt):
        asked.append(prompt)
        return [noisy]

    for cleaning, ious in (
        (MaskCleaning(4, 4), [0, 1, 1, 1]),
        (MaskCleaning(0, 4), [0, 396 / 400, 396 / 400, 396 / 400]),
        (MaskCleaning(3, 3), [0, 396 / 404, 396 / 404, 396 / 404]),
    ):
        asked.clear()
        user = SimulatedUser(encode_rle(truth), max_clicks=3)
        interactions = ImageInteractions(clicking(masks_of), [NOTHING], cleaning)
        [run] = run_objects([user], interactions.answer)
        assert run.ious == pytest.approx(ious)
        assert rle_area_px(interactions.shown[0][3]) == {1: 400, 396 / 400: 396, 396 / 404: 400}[ious[-1]]
        assert all(torch.equal(one.mask_mm > 0, torch.from_numpy(noisy)) for one in asked[1:])
    assert len(asked) == 3
