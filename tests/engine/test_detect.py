"""Detections of many prompts equal those of one prompt and one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3lora.engine.detect import detect_prompts
from sam3lora.engine.detections import PostProcessing
from sam3lora.engine.mask_codes import encode_logits
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.model.tokenization import tokenize

PROMPTS = ["gear", "bolt", "red arrow"]
SIZES = [(60, 90), (120, 40)]


@pytest.fixture(scope="module")
def staged(base) -> StagedSam3:
    return StagedSam3(base.model)


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_no_prompts_and_no_images(staged, base, pixel_values):
    assert detect_prompts(staged, base.tokenizer, pixel_values, [], sizes_hw=SIZES) == [[], []]
    assert detect_prompts(staged, base.tokenizer, pixel_values[:0], PROMPTS, sizes_hw=[]) == []


def test_batched_equals_one_by_one_and_one_vision_pass(staged, base, pixel_values, monkeypatch):
    passes = []
    encode = staged.encode_images
    monkeypatch.setattr(staged, "encode_images", lambda pixels: passes.append(len(pixels)) or encode(pixels))
    together = detect_prompts(staged, base.tokenizer, pixel_values, PROMPTS, sizes_hw=SIZES, max_prompts_per_forward=4)
    # six pairs in two chunks, but the vision tower ran once
    assert passes == [2]
    for image, of_image in enumerate(together):
        assert [instances.prompt for instances in of_image] == PROMPTS
        for instances in of_image:
            ((single,),) = detect_prompts(
                staged, base.tokenizer, pixel_values[image : image + 1], [instances.prompt], sizes_hw=[SIZES[image]]
            )
            np.testing.assert_allclose(instances.scores, single.scores, atol=1e-5)
            np.testing.assert_allclose(instances.presence, single.presence, atol=1e-5)
            np.testing.assert_allclose(instances.boxes_xyxy, single.boxes_xyxy, atol=1e-2)
            # logits near 0 may fall on either side: all but a few pixels agree
            first, second = (coco_mask.decode(found.masks) for found in (instances, single))
            assert (first != second).mean() < 1e-3


def test_detections_are_those_of_the_stock_model(staged, base, pixel_values):
    # scores, boxes and masks of every object query, against Sam3Model.forward with one padding box for the CLS token
    input_ids, attention_mask = tokenize(base.tokenizer, ["bolt"])
    with torch.no_grad():
        stock = base.model(
            pixel_values=pixel_values[:1],
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_boxes=torch.full((1, 1, 4), -10.0),
            input_boxes_labels=torch.full((1, 1), -10),
        )
    height, width = SIZES[0]
    ((found,),) = detect_prompts(staged, base.tokenizer, pixel_values[:1], ["bolt"], sizes_hw=SIZES[:1])
    scores = stock.pred_logits[0].sigmoid() * stock.presence_logits[0].sigmoid()
    order = scores.argsort(descending=True)
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-5)
    boxes = stock.pred_boxes[0][order].clamp(0, 1) * torch.tensor([width, height, width, height])
    np.testing.assert_allclose(found.boxes_xyxy, boxes, atol=1e-2)
    resized = torch.nn.functional.interpolate(stock.pred_masks[:, order], (height, width), mode="bilinear")[0] > 0
    assert (coco_mask.decode(found.masks) != resized.permute(1, 2, 0).numpy()).mean() < 1e-3


def test_threshold_and_limit(staged, base, pixel_values):
    def ask(threshold=0.0, max_detections=100):
        post = PostProcessing(threshold, nms="none", max_detections=max_detections)
        return detect_prompts(staged, base.tokenizer, pixel_values[:1], ["gear"], sizes_hw=SIZES[:1], post=post)[0][0]

    everything = ask()
    assert len(everything) == 32
    assert (np.diff(everything.scores) <= 0).all()
    cut = ask(threshold=float(everything.scores[4]))
    assert len(cut) == len(cut.masks) == len(cut.boxes_xyxy) == 5
    best = ask(max_detections=3)
    np.testing.assert_allclose(best.scores, everything.scores[:3])
    assert best.masks == everything.masks[:3]
    assert (cut.num_before_nms, best.num_before_nms) == (5, 32)
    # nothing reaches 1: an empty result that still tells presence, and no mask branch
    none = ask(threshold=1.0)
    assert len(none) == 0
    assert none.boxes_xyxy.shape == (0, 4)
    assert none.masks == []
    assert none.presence == pytest.approx(everything.presence)


def test_boxes_are_pixels_of_the_original(staged, base, pixel_values):
    small, large = (
        detect_prompts(staged, base.tokenizer, pixel_values[:1], ["gear"], sizes_hw=[size])[0][0]
        for size in ((60, 90), (120, 270))
    )
    # twice as high, three times as wide
    np.testing.assert_allclose(small.boxes_xyxy * [3, 2, 3, 2], large.boxes_xyxy, rtol=1e-4, atol=1e-3)
    assert large.masks[0]["size"] == [120, 270]
    assert (large.boxes_xyxy >= 0).all()
    assert (large.boxes_xyxy <= [270, 120, 270, 120]).all()


def test_text_is_encoded_once(staged, base, pixel_values, monkeypatch):
    seen = []
    encode = staged.encode_text
    monkeypatch.setattr(staged, "encode_text", lambda ids, mask: seen.append(len(ids)) or encode(ids, mask))
    cache = {}
    for prompts in (["gear", "bolt"], ["bolt", "gear", "arrow"]):
        detect_prompts(staged, base.tokenizer, pixel_values[:1], prompts, sizes_hw=SIZES[:1], text_cache=cache)
    assert seen == [2, 1]
    assert set(cache) == {"gear", "bolt", "arrow"}


def test_logits_are_enlarged_before_they_are_cut():
    # +1 and -3 at pixel centres 1 and 3 of four columns: the line crosses 0 a quarter of the way, at 1.5
    rle = encode_logits(np.array([[1.0, -3.0]]), (1, 8))
    np.testing.assert_array_equal(coco_mask.decode(rle)[0], [1, 1, 1, 0, 0, 0, 0, 0])


def test_sizes_must_match_images(staged, base, pixel_values):
    with pytest.raises(ValueError, match="2 images, got 1"):
        detect_prompts(staged, base.tokenizer, pixel_values, PROMPTS, sizes_hw=SIZES[:1])
