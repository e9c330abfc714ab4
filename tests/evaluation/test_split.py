"""A split's metrics: what is asked, what counts as truth, and how the numbers follow from the detections."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

import sam3lora
from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.engine.detections import Detections
from sam3lora.evaluation.metrics.ground_truth import build_ground_truth, prompted_categories
from sam3lora.evaluation.metrics.measure import SplitMetrics, measure_split
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.split_results import SplitResults
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata

SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def write_split(folder: Path, annotations: list[dict], categories: dict[int, str], num_images: int = 2) -> CocoIndex:
    folder.mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(num_images)]
    for image in images:
        cv2.imwrite(str(folder / image["file_name"]), np.full((60, 80, 3), 90, np.uint8))
    content = {
        "images": images,
        "annotations": [{"id": n, "iscrowd": 0, "bbox": [10, 10, 20, 20]} | a for n, a in enumerate(annotations)],
        "categories": [{"id": id_, "name": name} for id_, name in categories.items()],
    }
    (folder / ANNOTATION_FILE).write_text(json.dumps(content))
    return CocoIndex.from_folder(folder)


def thing(image_id: int, category_id: int, **more) -> dict:
    return {"image_id": image_id, "category_id": category_id, "segmentation": SQUARE} | more


# ---- what is asked --------------------------------------------------------------------------------------------------


def test_categories_with_one_prompt_are_asked_once(tmp_path):
    index = write_split(tmp_path / "s", [thing(0, 3), thing(0, 5), thing(1, 7)], {3: "Crack", 5: "fissure", 7: "hole"})
    asked = prompted_categories(index, prompts={"fissure": "crack"})
    assert [(c.id, c.name, c.prompt) for c in asked] == [(3, "Crack", "Crack"), (7, "hole", "hole")]
    truth, _, _ = build_ground_truth(index, asked)
    # objects of both names are objects of the one prompt
    assert [a["category_id"] for a in truth["annotations"]] == [3, 3, 7]


def test_names_without_objects_get_ids_of_their_own(tmp_path):
    index = write_split(tmp_path / "s", [thing(0, 3)], {3: "crack"})
    asked = prompted_categories(index, names=["leaf", "crack", "hole"])
    assert [(c.id, c.name) for c in asked] == [(4, "leaf"), (3, "crack"), (5, "hole")]


def test_objects_without_mask_and_crowds_are_not_to_be_found(tmp_path):
    annotations = [
        thing(0, 1),
        thing(0, 1, segmentation=[]),
        thing(1, 1, segmentation={"size": [60, 80], "counts": [0, 600, 4200]}, iscrowd=1, bbox=[0, 0, 10, 60]),
    ]
    index = write_split(tmp_path / "s", annotations, {1: "crack"})
    truth, presence, num_without_mask = build_ground_truth(index, prompted_categories(index))
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1, 1]
    # the box stands in for the mask
    assert truth["annotations"][1]["area"] == 400
    assert num_without_mask == 1
    # image 1 shows a crowd only: neither present nor absent
    assert presence == {(0, 1): True, (1, 1): None}


# ---- metrics --------------------------------------------------------------------------------------------------------


def measure(index: CocoIndex, answers: dict[str, tuple[float, list[np.ndarray]]], names=None) -> SplitMetrics:
    """Metrics of a model that gives each prompt the same presence and masks in every image, at a score of 0.9."""
    categories = prompted_categories(index, names)
    records = [index.record(row) for row in range(len(index))]
    found = []
    for record in records:
        size_hw = (record["height"], record["width"])
        found.append([])
        for category in categories:
            presence, masks = answers.get(category.prompt, (0.1, []))
            rles = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
            rles = [{"size": list(size_hw), "counts": rle["counts"].decode()} for rle in rles]
            boxes = np.tile(np.array([[10, 10, 30, 30]], np.float32), (len(rles), 1))
            scores = np.full(len(rles), 0.9, np.float32)
            found[-1].append(Detections(category.prompt, presence, size_hw, scores, boxes, rles))
    results = SplitResults.collect(records, categories, found)
    return measure_split(build_ground_truth(index, categories), results)


def square() -> np.ndarray:
    mask = np.zeros((60, 80), bool)
    mask[10:30, 10:30] = True
    return mask


def test_metrics_by_hand(tmp_path):
    # crack in image 0 only, found in both images at equal scores; hole in image 1 only, never found
    index = write_split(tmp_path / "s", [thing(0, 1), thing(1, 2)], {1: "crack", 2: "hole"})
    metrics = measure(index, {"crack": (0.8, [square()])})
    assert metrics.per_category["crack"].map_50 == pytest.approx(1)  # equal scores: the earlier image comes first
    assert metrics.per_category["hole"].map == 0
    assert metrics.map_50 == pytest.approx(0.5)
    # right about crack in image 0 and hole in image 0, wrong about crack and hole in image 1
    assert metrics.presence_accuracy == 0.5
    assert (metrics.num_images, metrics.num_ground_truth, len(metrics.predictions)) == (2, 2, 2)
    assert metrics.predictions[0]["bbox"] == [10, 10, 20, 20]
    # results are JSON
    json.dumps([metrics.to_dict(), metrics.predictions, metrics.ground_truth])


def test_names_only_seen_in_training_count_for_presence(tmp_path):
    index = write_split(tmp_path / "s", [thing(0, 1), thing(1, 1)], {1: "crack"})
    metrics = measure(index, {"crack": (0.9, [square()]), "leaf": (0.7, [])}, names=["crack", "leaf"])
    assert metrics.map == pytest.approx(1)
    assert metrics.per_category["leaf"].map is None
    assert metrics.presence_accuracy == 0.5


def test_presence_is_not_judged_where_only_a_crowd_is(tmp_path):
    crowd = thing(0, 1, segmentation={"size": [60, 80], "counts": [0, 600, 4200]}, iscrowd=1, bbox=[0, 0, 10, 60])
    index = write_split(tmp_path / "s", [crowd], {1: "crack"})
    # absent from image 1, which the model says too; image 0 is not counted although the model says absent there
    metrics = measure(index, {})
    assert metrics.presence_accuracy == 1
    only = index.select_rows([0])
    metrics = measure(only, {})
    assert metrics.presence_accuracy is None
    assert any("presence_accuracy is null" in note for note in metrics.notes)


def test_nothing_to_find_is_none_with_a_reason(tmp_path):
    index = write_split(tmp_path / "s", [thing(0, 1, segmentation=[])], {1: "crack"}, num_images=1)
    metrics = measure(index, {"crack": (0.9, [square()])})
    assert metrics.map is None
    assert metrics.presence_accuracy == 1
    assert any("map is null" in note for note in metrics.notes)
    assert any("1 object(s) have a box and no mask" in note for note in metrics.notes)


# ---- with a model ---------------------------------------------------------------------------------------------------


def test_batch_size_does_not_matter(base_folder, shapes):
    one, four = (
        sam3lora.evaluate(
            shapes,
            model=str(base_folder),
            device="cpu",
            nms="none",
            settings=EvaluationSettings(batch_size=size, max_prompts_per_forward=prompts),
        )
        for size, prompts in ((1, 2), (4, 16))
    )
    assert len(one.predictions) == len(four.predictions) == 4 * len(one.per_category) * 32
    np.testing.assert_allclose([p["score"] for p in one.predictions], [p["score"] for p in four.predictions], atol=1e-5)
    assert one.presence_accuracy == four.presence_accuracy


def test_evaluate_takes_settings_from_the_adapter(base, base_folder, shapes, tmp_path):
    peft_model = apply_lora(copy.deepcopy(base.model), LoraSettings(rank=2))
    metadata = AdapterMetadata(
        base_model=str(base_folder), base_fingerprint=base.fingerprint, resolution=224, geometry_cls=False
    )
    save_adapter(peft_model, tmp_path / "adapter", metadata)
    adapter = sam3lora.evaluate(shapes, adapter=tmp_path / "adapter", device="cpu", nms="none")
    plain, with_cls = (
        sam3lora.evaluate(shapes, model=str(base_folder), geometry_cls=cls, device="cpu", nms="none")
        for cls in (False, True)
    )
    # a new adapter changes nothing, so what differs is the setting that came from its metadata
    scores = [[p["score"] for p in metrics.predictions] for metrics in (adapter, plain, with_cls)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert np.abs(np.subtract(scores[0], scores[2])).max() > 1e-4


def test_evaluate_asks_and_counts_as_the_adapter_was_trained(base, base_folder, tmp_path):
    split = write_split(tmp_path / "s", [thing(0, 1)], {1: "crk"})
    peft_model = apply_lora(copy.deepcopy(base.model), LoraSettings(rank=2))
    metadata = AdapterMetadata(
        base_model=str(base_folder),
        post_processing=PostProcessing(threshold=0.45, nms_iou=0.6, max_detections=3),
        data={"prompt_of_category": {"crk": "crack in a wall"}},
    )
    save_adapter(peft_model, tmp_path / "adapter", metadata)
    found = sam3lora.evaluate(Path(split.source).parent, adapter=tmp_path / "adapter", device="cpu")
    assert (found.settings["threshold"], found.settings["nms_iou"]) == (0.45, 0.6)
    assert found.settings["prompts"] == {"crk": "crack in a wall"}
    assert found.num_predictions <= 2 * 3
