"""Which detections count: masks of a few pixels, drawn by hand, and random ones against pycocotools and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.mask_codes import rle_box_xyxy
from sam3lora.engine.postprocess import mask_iou, mask_iou_of_groups, padded_mask_iou, select, suppress
from sam3lora.errors import UserError

LENGTH = 12


def runs(*start_stop: tuple[int, int]) -> torch.Tensor:
    """Masks of one row of pixels: logit 1 from start to stop, -1 elsewhere."""
    position = torch.arange(LENGTH)
    return torch.stack([((position >= a) & (position < b)).float()[None] * 2 - 1 for a, b in start_stop])


def choose(masks_NHW, scores=None, merge_threshold=0.0, **settings):
    """Positions kept, their masks and merged flags; boxes enclose the masks."""
    if scores is None:
        scores = torch.linspace(0.9, 0.5, len(masks_NHW))
    boxes = torch.zeros(len(masks_NHW), 4)
    for row, mask in enumerate(masks_NHW[:, 0] > 0):
        if mask.any():
            where = mask.nonzero()
            boxes[row] = torch.tensor([where.min(), 0, where.max() + 1, 1])
    found = select(
        scores, boxes, masks_NHW, PostProcessing(**{"nms": "none"} | settings), merge_threshold=merge_threshold
    )
    return found.index_N.tolist(), found.mask_logits_NHW, found.is_merged_N.tolist()


def pixels(mask_HW: torch.Tensor) -> list[int]:
    return (mask_HW[0] > 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("settings", [{"nms": "none"}, {"nms": "box"}, {"nms": "mask"}, {"merge": True}])
def test_nothing_gives_nothing(settings):
    index, masks, merged = choose(runs((0, 1))[:0], **settings)
    assert (index, masks.shape, merged) == ([], (0, 1, LENGTH), [])
    # nor do boxes without masks
    found = select(torch.zeros(0), torch.zeros(0, 4), None, PostProcessing(**settings))
    assert (len(found.index_N), found.mask_logits_NHW) == (0, None)


@pytest.mark.parametrize("settings", [{"nms": "none"}, {"nms": "box"}, {"nms": "mask"}, {"merge": True}])
def test_one_stays_as_it_is(settings):
    mask = runs((2, 5))
    index, masks, merged = choose(mask, **settings)
    assert (index, merged) == ([0], [False])
    assert torch.equal(masks, mask)


@pytest.mark.parametrize("nms", ["box", "mask"])
def test_duplicates_go_and_the_best_stays(nms):
    masks = runs((0, 4), (0, 4), (6, 9), (0, 4))
    assert choose(masks, nms="none")[0] == [0, 1, 2, 3]
    index, kept, _ = choose(masks, nms=nms)
    assert index == [0, 2]
    # masks follow their detections
    assert [pixels(mask) for mask in kept] == [[0, 1, 2, 3], [6, 7, 8]]


@pytest.mark.parametrize("nms", ["box", "mask"])
def test_an_overlap_of_just_the_threshold_stays(nms):
    # 4 and 4 pixels, 2 of them shared: IoU 2 / 6
    masks = runs((0, 4), (2, 6))
    assert choose(masks, nms=nms, nms_iou=0.33)[0] == [0]
    assert choose(runs((0, 2), (0, 4)), nms=nms, nms_iou=0.5)[0] == [0, 1]
    # even of two identical ones, if only more than 1 would be too much
    assert choose(runs((0, 4), (0, 4)), nms=nms, nms_iou=1.0)[0] == [0, 1]


def test_a_suppressed_one_suppresses_nobody():
    # B overlaps A and goes; C overlaps only B and stays
    assert choose(runs((0, 6), (2, 8), (5, 11)), nms="mask", nms_iou=0.3)[0] == [0, 2]


def test_mask_and_box_overlap_differ():
    # two halves of an L and its corner: disjoint pixels, the same box
    left, right = -torch.ones(2, 3, 3)
    left[:, 0] = left[2, :2] = 1
    right[0, 1:] = right[:, 2] = 1
    boxes = torch.tensor([[0.0, 0, 3, 3], [0, 0, 3, 3]])
    scores, masks = torch.tensor([0.9, 0.8]), torch.stack([left, right])
    assert select(scores, boxes, masks, PostProcessing(nms="mask")).index_N.tolist() == [0, 1]
    assert select(scores, boxes, masks, PostProcessing(nms="box")).index_N.tolist() == [0]


@pytest.mark.parametrize("nms", ["box", "mask"])
def test_the_limit_comes_after_suppression(nms):
    # the two best are the same object: two different ones are left, not one
    masks = runs((0, 4), (0, 4), (6, 9), (10, 12))
    assert choose(masks, nms=nms, max_detections=2)[0] == [0, 2]


def test_a_chain_is_one_thing():
    # A and C do not touch, but both overlap B: one crack; D is another
    masks = runs((0, 4), (8, 12), (6, 9), (3, 7))
    index, merged_masks, merged = choose(masks[[0, 3, 2, 1]], merge=True, merge_iou=0.1)
    assert (index, merged) == ([0], [True])
    assert pixels(merged_masks[0]) == list(range(12))
    index, merged_masks, merged = choose(masks[[0, 1, 3]], merge=True, merge_iou=0.1)
    assert (index, merged) == ([0, 1], [True, False])
    assert [pixels(mask) for mask in merged_masks] == [list(range(7)), list(range(8, 12))]


def test_merging_starts_at_its_threshold():
    # IoU 2 / 4 exactly: joined from there on, above it not
    masks = runs((0, 2), (0, 4))
    assert choose(masks, merge=True, merge_iou=0.5)[0] == [0]
    assert choose(masks, merge=True, merge_iou=0.51)[0] == [0, 1]


@pytest.mark.parametrize("settings", [{"merge": True, "merge_iou": 0.5}, {"nms": "mask", "nms_iou": 0.4}])
def test_a_logit_of_zero_is_outside_the_mask(settings):
    assert choose(torch.tensor([[[1.0, 1, 0, 0]], [[0, 0, 1, 1]]]), **settings)[0] == [0, 1]


def test_a_union_keeps_the_larger_logit():
    # the outline of a union is that of its parts after enlarging as well
    masks = torch.tensor([[[3.0, 0.5, -2.0]], [[1.0, 2.0, -0.5]]])
    _, union, _ = choose(masks, merge=True)
    assert union.tolist() == [[[3.0, 2.0, -0.5]]]


def test_weak_ones_are_not_merged_but_suppressed():
    scores = torch.tensor([0.9, 0.7, 0.4, 0.3])
    masks = runs((0, 4), (3, 7), (3, 7), (8, 12))
    settings = {"merge": True, "merge_iou": 0.1, "merge_threshold": 0.5}
    index, kept, merged = choose(masks, scores, **settings)
    assert (index, merged) == ([0, 2, 3], [True, False, False])
    assert pixels(kept[0]) == list(range(7))
    # then NMS sees the union: 4 of its 7 pixels are those of the third
    assert choose(masks, scores, nms="mask", nms_iou=0.5, **settings)[0] == [0, 3]
    # at the threshold itself it takes part; with none there is nothing to join
    assert choose(masks, scores, merge=True, merge_iou=0.1, merge_threshold=0.4)[0] == [0, 3]
    assert choose(masks, scores, merge=True, merge_iou=0.1, merge_threshold=0.95)[0] == [0, 1, 2, 3]


def test_empty_masks_overlap_nothing():
    masks = runs((0, 0), (0, 0), (0, 4))
    assert choose(masks, nms="mask", nms_iou=0.0)[0] == [0, 1, 2]
    assert choose(masks, merge=True, merge_iou=0.1)[0] == [0, 1, 2]
    assert torch.equal(mask_iou(masks > 0), torch.diag(torch.tensor([0.0, 0.0, 1.0])))


def test_merged_boxes_enclose_their_union(base):
    # in the whole path: the box of a union is made of its mask at the original size, others are the model's own
    engine = Engine(base)
    image = engine.prepare_image(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8), "noise")
    post = PostProcessing(threshold=0.0, nms="none", merge=True, merge_iou=0.3)
    plain_post = PostProcessing(threshold=0.0, nms="none")
    (found,), (plain,) = engine.detect([PromptedImage(image, ("gear",), post=one) for one in (post, plain_post)])
    assert 0 < len(found) < found.num_before_nms == len(plain)
    as_they_were = {tuple(box) for box in plain.boxes_xyxy.tolist()}
    recomputed = [row for row, box in enumerate(found.boxes_xyxy.tolist()) if tuple(box) not in as_they_were]
    assert recomputed
    for row in recomputed:
        assert tuple(found.boxes_xyxy[row].tolist()) == rle_box_xyxy(found.rles[row])


@pytest.mark.parametrize("seed", range(5))
def test_mask_iou_is_that_of_pycocotools(seed):
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(9, 1, 1, generator=generator)
    masks = torch.rand(9, 33, 21, generator=generator) < density
    rles = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    expected = coco_mask.iou(rles, rles, [0] * len(rles))
    np.testing.assert_allclose(mask_iou(masks).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("counts", [[3], [1, 4, 2], [2, 2], [5, 1]])
def test_groups_of_masks_are_each_alone(counts):
    # one empty mask among them; padding is of no group
    masks = torch.rand(sum(counts), 9, 11, generator=torch.Generator().manual_seed(1)) > 0.6
    masks[0] = False
    expected = [mask_iou(group).numpy() for group in masks.split(counts)]
    for way in (mask_iou_of_groups, padded_mask_iou):
        for found, alone in zip(way(masks, counts), expected, strict=True):
            np.testing.assert_allclose(found, alone, atol=1e-6)


def test_mask_iou_is_exact_within_autocast():
    # detections are made under autocast: counts of pixels are no bfloat16 numbers (255 of 257 would be 1)
    masks = torch.ones(2, 1, 257, dtype=torch.bool)
    masks[1, 0, :2] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        overlaps = mask_iou(masks)
    assert overlaps.dtype == torch.float32
    assert overlaps[0, 1].item() == pytest.approx(255 / 257)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 0.9])
def test_box_suppression_is_that_of_torchvision(seed, iou):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(60, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 1 + 30 * torch.rand(60, 2, generator=generator)], 1)
    boxes[50:] = boxes[:10]
    boxes[48:50, 2:] = boxes[48:50, :2]  # no area
    boxes[49] = boxes[48]
    scores = torch.rand(60, generator=generator).sort(descending=True).values
    found = select(scores, boxes, None, PostProcessing(nms="box", nms_iou=iou, max_detections=60))
    assert found.index_N.tolist() == nms(boxes, scores, iou).tolist()


def test_suppress_without_overlaps():
    assert suppress(np.zeros((0, 0)), 0.5).tolist() == []


def test_masks_are_needed_where_masks_decide():
    with pytest.raises(ValueError, match="need masks"):
        select(torch.ones(1), torch.zeros(1, 4), None, PostProcessing(nms="mask"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("threshold", 1.5),
        ("nms_iou", -0.1),
        ("merge_iou", float("nan")),
        ("prompt_thresholds", {"crack": 2}),
        ("nms", "soft"),
        ("max_detections", 0),
        ("treshold", 0.5),
    ],
)
def test_values_out_of_range(setting, value):
    with pytest.raises(UserError, match=setting):
        PostProcessing(**{setting: value})
