"""A COCO file from the objects of a session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sam3lora.engine.mask_codes import rle_box_xyxy
from sam3lora.errors import UserError
from sam3lora.inference.clicks.result import ClickResult


def coco_of(objects: Sequence[ClickResult], file_name: str, size_hw: tuple[int, int]) -> dict[str, Any]:
    """`images`, `categories` in the order of first use, and `annotations` with compressed RLE and score.

    What clicks or a box made is marked as `corrected`, as in the downloads of the web page. `json.dump` writes it as a
    file that `sam3lora data` and training read.

    Raises:
        UserError: An object has no label, or no mask: annotations have both.
    """
    category_ids: dict[str, int] = {}
    annotations: list[dict[str, Any]] = []
    for number, one in enumerate(objects, start=1):
        if one.label is None:
            raise UserError(f"object {number} has no label: name it with session.label, or take it out with remove")
        if not one.area_px:
            raise UserError(f"object {number} ({one.label}) has an empty mask: click again, or take it out with remove")
        x0, y0, x1, y1 = rle_box_xyxy(one.rle)  # the detector's box may not be around its mask
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": category_ids.setdefault(one.label, len(category_ids) + 1),
                "segmentation": one.rle,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": one.area_px,
                "iscrowd": 0,
                "score": round(one.score, 6),
                **({"corrected": True} if one.is_corrected else {}),
            }
        )
    height, width = size_hw
    return {
        "images": [{"id": 1, "file_name": file_name, "width": width, "height": height}],
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        "annotations": annotations,
    }
