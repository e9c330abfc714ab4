"""The semantic output of a prompted model: the head's logits, and pixels counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3lora import evaluate
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.evaluation.dense.class_counts import Counts
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory
from sam3lora.evaluation.metrics.semantic import SemanticMetrics, count_semantic

from .adapters import write_adapter
from .splits import write_split

SQUARE = [[0, 0, 2, 0, 2, 2, 0, 2]]


def record_of(*objects, image_id: int = 1) -> dict:
    annotations = [
        {"category": name, "segmentation": segmentation, "iscrowd": crowd, "bbox_xywh": [2, 2, 2, 2]}
        for name, segmentation, crowd in objects
    ]
    return {"image_id": image_id, "height": 4, "width": 4, "annotations": annotations}


def category(number: int, *names: str) -> PromptedCategory:
    return PromptedCategory(number, names[0], names[0], set(names))


def test_counted_by_hand():
    found = np.full((4, 4), -1.0, np.float32)
    found[:, 0] = 0.0  # probability 0.5 counts
    crack, hole = category(7, "crack", "split"), category(9, "hole")
    record = record_of(("split", SQUARE, False), ("crack", None, False), ("hole", SQUARE, True))
    counts = count_semantic([record], [crack, hole], [[found, found]])
    # crack: 4 pixels, 4 found, 2 of both; its box without a mask is below, and judged nowhere.
    # hole: a crowd region alone, so of the 4 pixels found two are too many.
    assert counts.per_image().tolist() == [[[4, 0], [4, 2], [2, 0]]]
    metrics = SemanticMetrics.of(counts.total())
    assert metrics.per_category == [2 / 6, 0]
    assert metrics.mean_iou == pytest.approx(1 / 6)
    assert metrics.mean_dice == pytest.approx((4 / 8 + 0) / 2)


def test_where_absence_is_not_known_only_images_with_a_label_count():
    found = np.ones((4, 4), np.float32)
    records = [record_of(image_id=1), record_of(("crack", SQUARE, False), image_id=2)]
    crack = category(7, "crack")
    counts = count_semantic(records, [crack], [[found]] * 2, incomplete={7})
    assert counts.per_image()[:, :, 0].tolist() == [[0, 0, 0], [4, 16, 4]]
    assert count_semantic(records, [crack], [[found]] * 2).per_image()[0, 1, 0] == 16


def test_nothing_to_measure():
    metrics = SemanticMetrics.of(Counts(*np.zeros((3, 2), np.int64)))
    assert metrics == SemanticMetrics(None, None, [None, None])


def test_the_logits_are_those_of_the_whole_model(spread_base):
    engine = Engine.load(str(spread_base), device="cpu", max_rows=2)
    rng = np.random.default_rng(0)
    images = [engine.prepare_image(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8), str(n)) for n in range(2)]
    asked = [PromptedImage(images[0], ("crack", "hole", "gear")), PromptedImage(images[1], ("hole",))]
    together = engine.semantic_logits(asked)
    assert [len(found) for found in together] == [3, 1]
    (alone,) = engine.semantic_logits([PromptedImage(images[0], ("hole",))])
    np.testing.assert_allclose(together[0][1], alone[0], atol=1e-4)
    assert np.abs(together[0][0] - together[0][1]).max() > 1e-3
    with torch.no_grad():
        base = engine.base
        tokens = base.tokenizer(["hole"], return_tensors="pt", padding="max_length", max_length=32)
        pixels = torch.from_numpy(images[0].pixels_RR3).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (base.image_mean, base.image_std))
        box = {  # with the geometry CLS token, as the engine asks
            "input_boxes": torch.full((1, 1, 4), -10.0),
            "input_boxes_labels": torch.full((1, 1), -10),
        }
        stock = base.model(pixel_values=(pixels - mean) / std, **tokens, **box).semantic_seg
    np.testing.assert_allclose(alone[0], stock[0, 0].numpy(), atol=2e-3)


def test_a_split_is_measured_where_it_is_asked_for(spread_base, tmp_path):
    split = write_split(tmp_path / "valid", [(0, 1, 10), (1, 2, 10)], {1: "crack", 2: "hole"})
    folder = write_adapter(tmp_path / "best", spread_base)
    plain = evaluate(split, adapter=folder)
    assert plain.semantic_mean_iou is None
    assert "semantic_mean_iou" not in plain.to_dict()
    assert "semantic_iou" not in plain.to_dict()["per_category"]["crack"]
    asked = evaluate(split, adapter=folder, semantic=True)
    shown = asked.to_dict()
    own = [entry["semantic_iou"] for entry in shown["per_category"].values()]
    known = [value for value in own if value is not None]
    assert shown["semantic_mean_iou"] == (pytest.approx(np.mean(known)) if known else None)
    assert shown["map"] == plain.to_dict()["map"]
    assert len(own) == 2
