"""Generated ground truth and COCO results with what evaluators get wrong: crowds, ties, tiny masks, many detections."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def draw_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO dict (areas of masks, boxes, `iscrowd`) and results on it, of a few images and categories."""
    rng = np.random.default_rng(seed)
    height, width = (int(value) for value in rng.choice([[24, 40], [70, 50], [130, 140]]))
    size_hw = (height, width)
    image_ids = rng.choice(10**9, int(rng.integers(1, 6)), replace=False).tolist()
    category_ids = rng.choice(500, int(rng.integers(1, 5)), replace=False).tolist()
    with_crowds, with_ties, is_dense = rng.random(3) < (0.5, 0.5, 0.1)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in image_ids:
        if rng.random() < 0.15:  # an image without objects and detections
            continue
        for category_id in category_ids:
            ids = {"image_id": image_id, "category_id": category_id}
            for _ in range(rng.integers(0, 6) if rng.random() < 0.7 else 0):
                mask = _draw(rng, size_hw)
                annotations.append({"id": len(annotations) + 1, **ids, **_region(rng, mask)})
                annotations[-1]["iscrowd"] = int(with_crowds and rng.random() < 0.25)
                for _ in range(rng.integers(0, 3)):
                    moved = np.roll(mask, rng.integers(-2, 3, 2), (0, 1)) if rng.random() < 0.8 else mask
                    results.append({**ids, **_region(rng, moved)})
            for _ in range(rng.integers(95, 130) if is_dense and rng.random() < 0.3 else rng.integers(0, 4)):
                results.append({**ids, **_region(rng, _draw(rng, size_hw))})
    for result in results:
        score = rng.random()
        result["score"] = float(round(score, 1) if with_ties else np.float32(score))
    order = rng.permutation(len(results))
    images = [{"id": id_, "height": size_hw[0], "width": size_hw[1], "file_name": f"{id_}.png"} for id_ in image_ids]
    categories = [{"id": id_, "name": str(id_)} for id_ in category_ids]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return truth, [results[position] for position in order]


def _draw(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """A rectangle, now and then a single pixel, with a hole or in two parts."""
    mask = np.zeros(size_hw, np.uint8)
    height, width = (max(1, int(side * rng.choice([0.02, 0.25, 0.45, 0.8]))) for side in size_hw)
    y, x = (int(rng.integers(0, full - side + 1)) for full, side in zip(size_hw, (height, width), strict=True))
    mask[y : y + height, x : x + width] = 1
    if rng.random() < 0.3:
        mask[y + height // 3 : y + height // 2, x : x + width] = 0
    return mask


def _region(rng: np.random.Generator, mask: np.ndarray) -> dict[str, Any]:
    """Mask, area and a box that is not always the mask's."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    box = coco_mask.toBbox(rle)
    if rng.random() < 0.3:
        box = np.abs(box + rng.normal(0, 1, 4).round(2))
    segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    return {"segmentation": segmentation, "area": int(mask.sum()), "bbox": [float(value) for value in box]}
