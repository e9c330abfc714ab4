"""A labelled COCO data set of procedural scenes, for trying things with no data of one's own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import Progress

from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.data.synth.scenes import NATURAL, SHAPES, SHIFTED, Scene, draw_empty, draw_scene
from sam3lora.errors import UserError

JPEG_QUALITY = 92
EMPTY_SHARE = 0.08
NOUNS = {"base": (*SHAPES, *NATURAL), "shift": SHIFTED}
_SPLITS = ("train", "valid", "test")


def write_dataset(
    folder: str | Path,
    *,
    num_train: int,
    num_valid: int,
    num_test: int = 0,
    seed: int = 0,
    size: int = 224,
    domain: str = "shift",
    progress: bool = True,
) -> Path:
    """Draw a data set with exact masks: `train/`, `valid/` and, if wanted, `test/`.

    Each holds JPEG images and `_annotations.coco.json`.

    The category of an object is its noun. About one image in twelve is empty, so that absence can be learned and
    measured. Image k of a split depends on (seed, split, k) only: a larger set begins with the images of a smaller one.
    The folder appears whole at the end or not at all.

    Args:
        folder: Where to write; must not exist or be empty.
        num_train: Training images.
        num_valid: Validation images; drawn from another stream of the seed.
        num_test: Held-out images, from a third stream; 0 for no `test/`.
        seed: Same seed, same images.
        size: Side of the square images in pixels.
        domain: "shift" (gear, arrow, bolt, capsule on weave, wood and speckle: unknown to the built-in tiny model) or
            "base" (what that model was trained on).
        progress: Show a progress line on stderr.

    Returns:
        The folder.

    Raises:
        UserError: The folder holds something, or an argument is out of range.
    """
    folder = Path(folder)
    _check(folder, num_train, num_valid, num_test, seed, size, domain)
    counts = {split: count for split, count in zip(_SPLITS, (num_train, num_valid, num_test), strict=True) if count}
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        console = Console(stderr=True, quiet=not (progress and sys.stderr.isatty()))
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("drawing images", total=sum(counts.values()))
            splits = [
                _write_images(scratch / split, stream, count, seed, size, domain, lambda: bar.advance(task))
                for stream, (split, count) in enumerate(counts.items())
            ]
        categories = _categories(splits, domain)
        for split, content in zip(counts, splits, strict=True):
            _write_annotations(scratch / split / ANNOTATION_FILE, content, categories)
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def scene_of(stream: int, number: int, *, seed: int, size: int, domain: str) -> Scene:
    """The scene behind image `number` of a split (stream 0 train, 1 valid, 2 test)."""
    rng = np.random.default_rng([seed, stream, number])
    draw = draw_empty if rng.random() < EMPTY_SHARE else draw_scene
    return draw(rng, size=size, domain=domain)


def encode_mask(mask_HW: np.ndarray) -> list[list[float]] | dict[str, Any]:
    """A COCO segmentation that decodes to exactly this mask: one polygon if one outline says it all, else an RLE.

    >>> encode_mask(np.eye(4, dtype=bool)[:1].repeat(2, 0))
    [[0.0, 0.0, 0.0, 2.0, 1.0, 2.0, 1.0, 0.0]]
    """
    rle = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    outline = _outline(mask_HW)
    if outline is not None:
        height, width = mask_HW.shape
        drawn = coco_mask.merge(coco_mask.frPyObjects([outline], height, width))
        if drawn["counts"] == rle["counts"]:
            return [outline]
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _outline(mask_HW: np.ndarray) -> list[float] | None:
    """Corners along the pixel edges of a mask that is one part without holes, else None.

    OpenCV traces pixel centres. On the mask enlarged four times these are 4x on a left or upper edge and 4x - 1 on a
    right or lower one, which tells the edge they belong to.
    """
    enlarged = mask_HW.astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    contours, _ = cv2.findContours(enlarged, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) != 1:
        return None
    corners = (contours[0].reshape(-1, 2) + 1) // 4
    corners = corners[np.any(corners != np.roll(corners, 1, axis=0), axis=1)]
    return corners.astype(float).ravel().tolist()


def _check(folder: Path, num_train: int, num_valid: int, num_test: int, seed: int, size: int, domain: str) -> None:
    if domain not in NOUNS:
        raise UserError(f"domain must be one of {', '.join(NOUNS)}, got {domain!r}")
    bounds = (("num_train", num_train, 1), ("num_valid", num_valid, 1), ("num_test", num_test, 0), ("size", size, 32))
    for name, value, least in bounds:
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: name a new folder, or remove this one first")


def _write_images(folder: Path, stream: int, count: int, seed: int, size: int, domain: str, advance) -> dict[str, list]:
    """Write the images of one split; returns its entries, with nouns in place of category ids."""
    folder.mkdir(parents=True)
    content: dict[str, list] = {"images": [], "annotations": []}
    for number in range(count):
        scene = scene_of(stream, number, seed=seed, size=size, domain=domain)
        file_name, image_id = f"{number:05d}.jpg", number + 1
        pixels = cv2.cvtColor(scene.image_HW3, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / file_name), pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        content["images"].append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for thing in scene.objects:
            if not thing.mask_HW.any():  # wholly behind later objects
                continue
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "noun": thing.noun,
                    "bbox": [float(value) for value in thing.box_xywh],
                    "area": int(thing.mask_HW.sum()),
                    "segmentation": encode_mask(thing.mask_HW),
                    "iscrowd": 0,
                }
            )
        advance()
    return content


def _categories(splits: list[dict[str, list]], domain: str) -> dict[str, int]:
    """Noun -> category id, the same in all splits: all of the shifted domain, those that occur of the base one."""
    occurring = {annotation["noun"] for content in splits for annotation in content["annotations"]}
    nouns = [noun for noun in NOUNS[domain] if domain == "shift" or noun in occurring]
    return {noun: number + 1 for number, noun in enumerate(nouns)}


def _write_annotations(path: Path, content: dict[str, list], categories: dict[str, int]) -> None:
    for annotation in content["annotations"]:
        annotation["category_id"] = categories[annotation.pop("noun")]
    content["categories"] = [{"id": number, "name": noun} for noun, number in categories.items()]
    path.write_text(json.dumps(content), encoding="utf-8")
