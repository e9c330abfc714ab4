"""A drawn data set of the size of COCO train2017: as many images, objects, categories and points of outlines.

Only some hundred pictures are drawn: all other image files are hard links to them.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import cv2
import numpy as np

from sam3lora.data.coco import ANNOTATION_FILE

WIDTH, HEIGHT = 640, 480
NUM_CATEGORIES = 80
CROWD_SHARE = 0.01
NEGATIVE_SHARE = 0.01  # of the images
_PIECE = 20_000  # annotations that are drawn at a time


@dataclass(frozen=True)
class SplitSize:
    """Images, objects and distinct pictures of one split."""

    num_images: int
    num_objects: int
    num_pictures: int = 200


COCO_2017 = {"train": SplitSize(118_000, 860_000), "valid": SplitSize(5_000, 37_000, 20)}


def scaled(share: float) -> dict[str, SplitSize]:
    """Splits of a share of COCO's size."""
    return {
        name: SplitSize(*(max(1, round(share * number)) for number in astuple(size)))
        for name, size in COCO_2017.items()
    }


def draw_large_set(root: Path, splits: dict[str, SplitSize], *, seed: int = 0) -> None:
    """Draw the splits that `root` lacks. The annotation file comes last: a split that has one is complete."""
    for position, (name, size) in enumerate(splits.items()):
        folder = root / name
        if (folder / ANNOTATION_FILE).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng([seed, position])
        names = [f"{number:012d}.jpg" for number in range(size.num_images)]
        _write_pictures(folder, names, size.num_pictures, generator)
        scratch = folder / (ANNOTATION_FILE + ".part")
        with scratch.open("w", encoding="ascii") as stream:
            stream.writelines(_annotation_file(names, size, generator))
        scratch.replace(folder / ANNOTATION_FILE)


def _annotation_file(names: list[str], size: SplitSize, generator: np.random.Generator) -> Iterator[str]:
    """The text of a COCO file in pieces. As in COCO, annotations are not in the order of their images."""
    image_ids = generator.permutation(5 * size.num_images)[: size.num_images]
    images = [
        {"id": int(id_), "file_name": name, "height": HEIGHT, "width": WIDTH}
        for id_, name in zip(image_ids, names, strict=True)
    ]
    yield f'{{"images": {json.dumps(images)}, "annotations": ['
    # Objects of an image and of a category are spread as widely as COCO's: some have a hundred times more than others.
    shown = image_ids[generator.random(size.num_images) >= NEGATIVE_SHARE]
    weights = generator.gamma(1.0, size=len(shown))
    more = generator.choice(shown, max(size.num_objects - len(shown), 0), p=weights / weights.sum())
    owners = generator.permutation(np.concatenate([shown, more]))[: size.num_objects]
    of_category = 1.0 / np.arange(2, NUM_CATEGORIES + 2)
    for start in range(0, size.num_objects, _PIECE):
        chosen = owners[start : start + _PIECE]
        categories = 1 + generator.choice(NUM_CATEGORIES, len(chosen), p=of_category / of_category.sum())
        lines = _annotations(start + 1, chosen, categories, generator)
        yield ("," if start else "") + ",".join(lines)
    rows = [{"id": id_, "name": f"thing {id_:02d}"} for id_ in range(1, NUM_CATEGORIES + 1)]
    yield f'], "categories": {json.dumps(rows)}}}'


def _annotations(
    first_id: int, image_ids: np.ndarray, categories: np.ndarray, generator: np.random.Generator
) -> Iterator[str]:
    """One JSON text for each object: star-shaped polygons, mostly one of some 25 points; crowds as run lengths."""
    num = len(image_ids)
    sides = np.clip(generator.lognormal(np.log(55), 0.9, (num, 1)) * generator.lognormal(0, 0.3, (num, 2)), 5, 470)
    corners = generator.random((num, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    crowds = generator.random(num) < CROWD_SHARE
    num_parts = np.where(generator.random(num) < 0.1, generator.integers(2, 4, num), 1)
    num_points = np.clip(generator.lognormal(np.log(19), 0.6, num), 4, 300).astype(int)
    texts = _Hundredths()
    for row in range(num):
        box = np.concatenate([corners[row], sides[row]])
        if crowds[row]:
            segmentation = _runs(box, generator)
        else:
            parts = [_outline(box, num_points[row], part, num_parts[row], generator) for part in range(num_parts[row])]
            corner = np.min([part.reshape(-1, 2).min(0) for part in parts], axis=0)
            box = np.append(corner, np.max([part.reshape(-1, 2).max(0) for part in parts], axis=0) - corner) / 100
            segmentation = "[" + ",".join(f"[{texts.join(part)}]" for part in parts) + "]"
        yield (
            f'{{"segmentation": {segmentation}, "area": {0.6 * box[2] * box[3]:.4f}, "iscrowd": {int(crowds[row])}, '
            f'"image_id": {image_ids[row]}, "bbox": [{texts.join((box * 100).round().astype(int))}], '
            f'"category_id": {categories[row]}, "id": {first_id + row}}}'
        )


def _outline(
    box_xywh: np.ndarray, num_points: int, part: int, num_parts: int, generator: np.random.Generator
) -> np.ndarray:
    """x0, y0, x1, ... in hundredths of a pixel of one of the parts, which lie beside each other in the box."""
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    radii = generator.uniform(0.6, 1.0, num_points)
    points = 0.5 + 0.5 * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    points[:, 0] = (part + points[:, 0]) / num_parts
    return ((box_xywh[:2] + points * box_xywh[2:]) * 100).astype(int).ravel()


def _runs(box_xywh: np.ndarray, generator: np.random.Generator) -> str:
    """Uncompressed run lengths of a region whose upper and lower edge run at random through the box."""
    x, y, width, height = box_xywh.astype(int)
    columns = np.arange(x, x + width)
    upper = columns * HEIGHT + y + generator.integers(0, max(height // 3, 1), width)
    lower = columns * HEIGHT + y + height - generator.integers(0, max(height // 3, 1), width)
    edges = np.stack([upper, lower], 1).ravel()
    counts = np.diff(edges, prepend=0, append=WIDTH * HEIGHT).tolist()
    return f'{{"counts": {counts}, "size": [{HEIGHT}, {WIDTH}]}}'


class _Hundredths:
    """Texts of numbers with two decimals, made once: formatting is most of the work."""

    texts = [f"{number // 100}.{number % 100:02d}" for number in range(100 * max(WIDTH, HEIGHT) + 1)]

    def join(self, hundredths: np.ndarray) -> str:
        return ",".join(map(self.texts.__getitem__, hundredths.tolist()))


def _write_pictures(folder: Path, names: list[str], num_pictures: int, generator: np.random.Generator) -> None:
    """Pictures of 60 to 90 KB with shapes and noise, under the first names; the other names are links to them."""
    for name in names[:num_pictures]:
        coarse = generator.integers(0, 255, (HEIGHT // 20, WIDTH // 20, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            centre = generator.integers((0, 0), (WIDTH, HEIGHT)).tolist()
            colour = generator.integers(0, 255, 3).tolist()
            cv2.circle(picture, centre, int(generator.integers(10, 90)), colour, -1)
        noise = generator.integers(0, 20, picture.shape, dtype=np.uint8)
        picture = np.minimum(picture, 255 - noise) + noise
        cv2.imwrite(str(folder / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
    for name, original in zip(names[num_pictures:], itertools.cycle(names[:num_pictures])):
        if not (folder / name).exists():
            os.link(folder / original, folder / name)
