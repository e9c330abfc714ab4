"""Labels with faults, made from good ones."""

from __future__ import annotations

import json
from pathlib import Path

from sam3lora.data.coco import ANNOTATION_FILE

FAULTS = {"missing_image": 1, "empty_object": 1, "out_of_bounds": 1}
"""What `add_faults` adds: kind -> count. One label and one image are left out, and one label is clipped."""


def add_faults(split: Path) -> Path:
    """Add an image that does not exist, an object without area beside one of its kind, and one half outside."""
    file = split / ANNOTATION_FILE
    content = json.loads(file.read_text())
    content["images"].append({"id": 900, "file_name": "gone/a.jpg", "width": 80, "height": 60})
    first = content["annotations"][0]
    outside = [[-30, 10, 20, 10, 20, 40, -30, 40]]
    content["annotations"] += [
        first | {"id": 901, "bbox": [10, 10, 0, 5], "segmentation": []},
        first | {"id": 902, "bbox": [-30, 10, 50, 30], "segmentation": outside},
    ]
    file.write_text(json.dumps(content))
    return split


def counts(faults) -> dict[str, int]:
    """Kind -> count over all splits."""
    found: dict[str, int] = {}
    for fault in faults:
        found[fault["kind"]] = found.get(fault["kind"], 0) + fault["count"]
    return found
