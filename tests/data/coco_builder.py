"""Annotations drawn by hand, and the names of the real data sets."""

from __future__ import annotations

SHARED_FOLDERS = ("coco_tiny_permissive", "facade", "mushrooms", "potholes_gopro", "strawberry", "uav_crack_dense")


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def annotation(id_: int, image_id: int = 0, category_id: int = 1, **changes) -> dict:
    """A 20 x 20 square at (10, 10)."""
    base = {
        "id": id_,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [10, 10, 20, 20],
        "segmentation": [square(10, 10, 20)],
        "area": 1,
        "iscrowd": 0,
    }
    return {**base, **changes}
