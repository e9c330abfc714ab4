"""Images, broken ones too, and settings for tests of batch runs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from sam3lora.config.post_processing import PostProcessing
from sam3lora.inference.batch.output_folder import open_output

REPOSITORY = Path(__file__).parents[2]
PROMPTS = {"gear": 1, "red bolt": 2}
POST = PostProcessing(threshold=0.0, nms="none", max_detections=3)  # random weights are sure of nothing
BROKEN = {"empty.jpg": "the file is empty", "sub/cut.jpg": "truncated", "text.png": "no known image format"}


def draw_image(path: Path, seed: int = 0, size_hw: tuple[int, int] = (40, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(pixels, size_hw[::-1], interpolation=cv2.INTER_NEAREST))
    return path


def draw_images(folder: Path, num_images: int) -> Path:
    """Images in two folders, with the same base names in both, and three broken ones."""
    for number in range(num_images - len(BROKEN)):
        draw_image(folder / ("sub" if number % 2 else "") / f"{number // 2}.png", number)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    whole = draw_image(folder / "sub" / "cut.jpg").read_bytes()
    (folder / "sub" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def begin(output: Path, settings: dict, **options) -> None:
    with open_output(output, settings, **options):
        pass
