"""Writing a COCO data set of generated scenes, for trying things out without data of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import Progress

from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.data.masks import trace_outlines
from sam3lora.data.rle import encode_rle
from sam3lora.data.synth.scenes import NATURAL, SHAPES, SHIFTED, Scene, draw_empty, draw_scene
from sam3lora.errors import UserError
from sam3lora.files import whole_folder

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
    """Draw a data set with exact masks: `train/`, `valid/` and optionally `test/`.

    Each holds JPEG images and `_annotations.coco.json`. The category of an object is its noun. About one image in
    twelve is empty, so that absence can be learned and measured. Image k of a split depends only on the seed, the split
    and k, so a larger set begins with the images of a smaller one.

    Args:
        folder: Folder to write, new or empty; after an error nothing is left in it.
        size: Side of the square images in pixels.
        domain: "shift" (gear, arrow, bolt, capsule on weave, wood and speckle: unknown to the built-in tiny model) or
            "base" (what that model was trained on).
        progress: Show a progress line on stderr.

    Raises:
        UserError: The folder is not empty, or an argument is out of range.
    """
    folder = Path(folder)
    _check(folder, num_train, num_valid, num_test, seed, size, domain)
    counts = {split: count for split, count in zip(_SPLITS, (num_train, num_valid, num_test), strict=True) if count}
    with whole_folder(folder) as scratch:
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
    return folder


def scene_of(stream: int, number: int, *, seed: int, size: int, domain: str) -> Scene:
    """The scene of image `number` of a split; stream 0 is train, 1 valid, 2 test."""
    rng = np.random.default_rng([seed, stream, number])
    draw = draw_empty if rng.random() < EMPTY_SHARE else draw_scene
    return draw(rng, size=size, domain=domain)


def encode_mask(mask_HW: np.ndarray) -> list[list[float]] | dict[str, Any]:
    """A COCO segmentation that decodes to exactly this mask: a polygon if one describes it exactly, otherwise an RLE.

    >>> encode_mask(np.eye(4, dtype=bool)[:1].repeat(2, 0))
    [[0.0, 0.0, 0.0, 2.0, 1.0, 2.0, 1.0, 0.0]]
    """
    rle = encode_rle(mask_HW)
    outlines, num_holes = trace_outlines(mask_HW)
    if len(outlines) == 1 and not num_holes:
        polygon = outlines[0].astype(float).ravel().tolist()
        drawn = coco_mask.merge(coco_mask.frPyObjects([polygon], *mask_HW.shape))
        if drawn["counts"].decode("ascii") == rle["counts"]:  # outlines that touch themselves may draw otherwise
            return [polygon]
    return rle


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
    """Write the images of one split; returns their COCO entries, with nouns instead of category ids."""
    folder.mkdir(parents=True)
    content: dict[str, list] = {"images": [], "annotations": []}
    for number in range(count):
        scene = scene_of(stream, number, seed=seed, size=size, domain=domain)
        file_name, image_id = f"{number:05d}.jpg", number + 1
        pixels = cv2.cvtColor(scene.image_HW3, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / file_name), pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        content["images"].append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for thing in scene.objects:
            if not thing.mask_HW.any():  # completely behind later objects
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
    """Noun -> category id, equal in all splits: all nouns of the shifted domain, the nouns in use of the base one."""
    occurring = {annotation["noun"] for content in splits for annotation in content["annotations"]}
    nouns = [noun for noun in NOUNS[domain] if domain == "shift" or noun in occurring]
    return {noun: number + 1 for number, noun in enumerate(nouns)}


def _write_annotations(path: Path, content: dict[str, list], categories: dict[str, int]) -> None:
    for annotation in content["annotations"]:
        annotation["category_id"] = categories[annotation.pop("noun")]
    content["categories"] = [{"id": number, "name": noun} for noun, number in categories.items()]
    path.write_text(json.dumps(content), encoding="utf-8")
