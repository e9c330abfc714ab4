"""Hand-made COCO folders, the real data sets, and one Ray for a module."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam3lora.local_ray import start_local_ray

from .coco_builder import SHARED_FOLDERS

REPOSITORY = Path(__file__).resolve().parents[2]


class Folder:
    """Writes a split folder: images of 80 x 60 (width x height) with ids 0, 1, ... and an annotation file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, annotations, *, num_images=1, categories=(("crack", 1),), images=None, draw=True) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        entries = [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in range(num_images)]
        entries = entries if images is None else images
        if draw:
            for i, entry in enumerate(entries):
                pixels = np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)
                cv2.imwrite(str(self.path / entry["file_name"]), pixels)
        content = {
            "images": entries,
            "annotations": list(annotations),
            "categories": [{"id": id_, "name": name} for name, id_ in categories],
        }
        (self.path / "_annotations.coco.json").write_text(json.dumps(content))
        return self.path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "train")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = Path(os.environ.get("SAM3LORA_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not all((path / name).is_dir() for name in SHARED_FOLDERS):
        pytest.skip(f"the real data sets are not in {path}; set SAM3LORA_DATA_DIR")
    return path


@pytest.fixture(scope="module")
def ray_session():
    import ray

    start_local_ray(3, log_to_driver=False, logging_level="WARNING")
    yield ray
    ray.shutdown()
