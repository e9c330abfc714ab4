"""Detections of the whole path, from pixels to results, against the stock model and against asking one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.features import to_pixel_values
from sam3lora.engine.selection import SmallDetections, Wanted
from sam3lora.model.tokenization import tokenize

from .engine_cases import EVERY

SIZE = (60, 90)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def engine(base) -> Engine:
    return Engine(base, max_rows=4)


@pytest.fixture
def ask(engine, image):
    def ask(prompt="gear", pixels=image, **options) -> Detections:
        prepared = engine.prepare_image(pixels, str(hash(pixels.tobytes())))
        return engine.detect([PromptedImage(prepared, (prompt,), **{"post": EVERY} | options)])[0][0]

    return ask


PADDING_BOX = [[-10.0] * 4], [-10]  # adds the CLS token
# relative to 60 x 90 pixels: center x, center y, width, height
SHOWN_BOXES = [[0.3, 0.3, 0.4, 0.4], [65 / 90, 40 / 60, 30 / 90, 40 / 60]], [1, 0]


@pytest.mark.parametrize(
    ("boxes", "stock_boxes"),
    [((), PADDING_BOX), ((BoxPrompt((9, 6, 45, 30)), BoxPrompt((50, 20, 80, 60), label=0)), SHOWN_BOXES)],
)
def test_detections_are_those_of_the_stock_model(boxes, stock_boxes, base, image, ask):
    # scores, boxes and masks of every object query, against Sam3Model.forward
    input_ids, attention_mask = tokenize(base.tokenizer, ["bolt"])
    with torch.no_grad():
        stock = base.model(
            pixel_values=to_pixel_values([image], base.resolution),
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_boxes=torch.tensor([stock_boxes[0]]),
            input_boxes_labels=torch.tensor([stock_boxes[1]]),
        )
    found = ask("bolt", boxes=boxes)
    scores = stock.pred_logits[0].sigmoid() * stock.presence_logits[0].sigmoid()
    order = scores.argsort(descending=True)
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-5)
    boxes = stock.pred_boxes[0][order].clamp(0, 1) * torch.tensor([90, 60, 90, 60])
    np.testing.assert_allclose(found.boxes_xyxy, boxes, atol=1e-2)
    resized = torch.nn.functional.interpolate(stock.pred_masks[:, order], SIZE, mode="bilinear")[0] > 0
    assert (coco_mask.decode(found.rles) != resized.permute(1, 2, 0).numpy()).mean() < 1e-3


def test_threshold_and_limit(ask):
    everything = ask()
    assert len(everything) == 32
    assert (np.diff(everything.scores) <= 0).all()
    fifth = float(everything.scores[4])
    cut = ask(post=EVERY.changed(threshold=fifth))
    assert len(cut) == len(cut.rles) == len(cut.boxes_xyxy) == 5
    best = ask(post=EVERY.changed(max_detections=3))
    np.testing.assert_allclose(best.scores, everything.scores[:3])
    assert best.rles == everything.rles[:3]
    assert (cut.num_before_nms, best.num_before_nms) == (5, 32)
    # nothing reaches 1: an empty result that still tells presence
    none = ask(post=EVERY.changed(threshold=1.0))
    assert (len(none), none.boxes_xyxy.shape, none.rles) == (0, (0, 4), [])
    assert none.presence == pytest.approx(everything.presence)
    # a threshold of its own for this prompt, however it is written; another prompt's leaves it alone
    own = EVERY.changed(threshold=1.0, prompt_thresholds={"Gear": fifth})
    assert (len(ask(post=own)), len(ask("bolt", post=own))) == (5, 0)


def test_masks_suppress_even_if_they_are_not_wanted(ask):
    post = PostProcessing(threshold=0.0, nms="mask", nms_iou=0.3)
    seen, unseen = ask(post=post), ask(post=post, masks=False)
    assert 0 < len(seen) < seen.num_before_nms
    np.testing.assert_array_equal(seen.scores, unseen.scores)
    assert unseen.rles is None
    with pytest.raises(ValueError, match="masks"):
        _ = unseen.masks
    # unions have the box of their mask
    merging = post.changed(merge=True)
    np.testing.assert_array_equal(ask(post=merging).boxes_xyxy, ask(post=merging, masks=False).boxes_xyxy)


def test_a_lowest_score_keeps_more_and_merges_no_more(ask):
    post = PostProcessing(threshold=float(ask().scores[5]), nms="none", merge=True, merge_iou=0.2)
    served, measured = ask(post=post), ask(post=post, lowest_score=0.0)
    # at the threshold both are the same detections
    above = measured.scores >= post.threshold
    np.testing.assert_array_equal(measured.scores[above], served.scores)
    np.testing.assert_array_equal(measured.boxes_xyxy[above], served.boxes_xyxy)
    assert (~above).sum() == 26


def test_boxes_are_pixels_of_the_original(ask, image):
    # twice as high, three times as wide, the same picture to the model
    large = image.repeat(2, axis=0).repeat(3, axis=1)
    found, of_large = ask(), ask(pixels=large)
    assert of_large.rles[0]["size"] == [120, 270]
    assert (of_large.boxes_xyxy >= 0).all()
    assert (of_large.boxes_xyxy <= [270, 120, 270, 120]).all()
    # scores that are almost equal may come in another order
    distances = np.abs(found.boxes_xyxy[:, None] * [3, 2, 3, 2] - of_large.boxes_xyxy[None]).max(2)
    assert max(distances.min(0).max(), distances.min(1).max()) < 8


@pytest.mark.parametrize("size_hw", [(8, 8), (40, 30), (3, 3)])
def test_detections_without_a_pixel_are_no_detections(size_hw):
    # Three masks: a block, nothing, and a speck that is lost unless the centre of a pixel lies on it.
    logits = np.full((3, 8, 8), -5.0, np.float32)
    logits[0, 1:6, 1:6] = 5
    logits[2, 6, 6] = 0.01
    boxes = np.array([[0.4, 0.4, 0.6, 0.6], [0.5, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]], np.float32)
    scores = np.array([0.9, 0.8, 0.7], np.float32)
    expected = [0.9, 0.7] if size_hw == (8, 8) else [0.9]
    for masks in (True, False):  # the same whether masks are sent or not
        wanted = Wanted("gear", size_hw, EVERY, masks=masks)
        small = SmallDetections(wanted, 0.5, scores, boxes, logits, np.zeros(3, bool), num_before_nms=3)
        found = small.at_full_size()
        assert found.scores.tolist() == pytest.approx(expected)
        assert len(found.boxes_xyxy) == len(expected)
        assert found.num_before_nms == 3
        if masks:
            assert min(found.areas_px) > 0
            made = [small.encode(row) for row in range(3)]
            assert small.at_full_size(made).rles == found.rles
    # no masks were made: nothing is known of pixels
    small = SmallDetections(Wanted("gear", size_hw, EVERY, masks=False), 0.5, scores, boxes, None, np.zeros(3, bool))
    assert len(small.at_full_size()) == 3
