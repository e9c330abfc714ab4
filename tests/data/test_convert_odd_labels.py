"""Odd labels at random: whatever a label file holds, it is read, or counted as lost, or refused in one message."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3lora.data.convert.labelled_set import LabelledSet
from sam3lora.data.convert.labelme import read_labelme
from sam3lora.data.convert.voc import read_voc
from sam3lora.data.convert.yolo import read_yolo
from sam3lora.errors import UserError

from .convert_cases import read_set, write_image

NUM_FILES = 400
WIDTH, HEIGHT = 24, 16
ODD_NUMBERS = (
    0,
    -1,
    1e-9,
    -0.0,
    1e9,
    -1e9,
    1e300,
    -1e300,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    True,
    None,
    "7",
    "x",
)
PLACES = ("", "a/", "a/b/", "c/")


def number(rng: random.Random, high: float):
    return rng.choice(ODD_NUMBERS) if rng.random() < 0.015 else rng.uniform(-0.2 * high, 1.2 * high)


def points(rng: random.Random) -> list:
    return [[number(rng, WIDTH), number(rng, HEIGHT)] for _ in range(rng.choice((0, 1, 2, 2, 3, 3, 4, 9)))]


def mask(rng: random.Random) -> object:
    if rng.random() < 0.1:
        return rng.choice((None, "", "!", 5, [], "AAAA"))
    size = rng.randint(1, 12), rng.randint(1, 12)
    picture = Image.new(rng.choice(("1", "L", "RGB", "LA")), size, rng.choice((0, 1)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_labelme(rng: random.Random, root: Path, stem: str) -> int:
    shapes = []
    for _ in range(rng.randint(0, 4)):
        kind = rng.choice(
            ("polygon", "polygon", "rectangle", "circle", "mask", "line", "point", "linestrip", "new", None)
        )
        shape = {"label": rng.choice(("crack", "hole")), "points": points(rng), "shape_type": kind}
        if kind == "mask":
            picture = mask(rng)
            x, y = rng.randint(-3, WIDTH), rng.randint(-3, HEIGHT)
            w, h = Image.open(io.BytesIO(base64.b64decode(picture))).size if _is_png(picture) else (3, 3)
            shape |= {"mask": picture, "points": [[x, y], [x + w - rng.choice((0, 1, 1, 1)), y + h - 1]]}
        shapes.append(shape)
    size = (
        {"imageHeight": HEIGHT, "imageWidth": WIDTH} if rng.random() < 0.9 else {"imageHeight": rng.choice((0, -1, 8))}
    )
    (root / f"{stem}.json").write_text(json.dumps({"shapes": shapes, "imagePath": f"{Path(stem).name}.png", **size}))
    return len(shapes)


def _is_png(picture: object) -> bool:
    return isinstance(picture, str) and len(picture) > 20


def write_yolo(rng: random.Random, root: Path, stem: str) -> int:
    lines = []
    for _ in range(rng.randint(0, 4)):
        count = rng.choice((4, 4, 6, 8, 8)) if rng.random() < 0.97 else rng.choice((3, 5, 7))
        values = [
            max(0.0, min(1.0, rng.uniform(-0.1, 1.1))) if rng.random() < 0.99 else number(rng, 1) for _ in range(count)
        ]
        lines.append(" ".join(map(str, [rng.choice((0, 1)), *values])))
    path = root / "labels" / f"{stem.removeprefix('images/')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return len(lines)


def write_voc(rng: random.Random, root: Path, stem: str) -> int:
    entries = []
    for _ in range(rng.randint(0, 4)):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (number(rng, WIDTH) for _ in range(4)), strict=True)
        box = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
        entries.append(f"<object><name>{rng.choice(('crack', 'hole'))}</name><bndbox>{box}</bndbox></object>")
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>" if rng.random() < 0.9 else ""
    (root / f"{stem}.xml").write_text(f"<annotation>{size}{''.join(entries)}</annotation>")
    return len(entries)


FORMATS = [
    (read_labelme, write_labelme, "train/"),
    (read_yolo, write_yolo, "images/train/"),
    (read_voc, write_voc, "train/"),
]


@pytest.mark.parametrize(("read", "write", "folder"), FORMATS, ids=["labelme", "yolo", "voc"])
def test_every_label_is_kept_or_counted(tmp_path, read, write, folder):
    rng = random.Random(7)
    num_read = num_objects = 0
    for case in range(NUM_FILES):
        root = tmp_path / str(case)
        stems = {f"{folder}{rng.choice(PLACES)}{rng.randint(0, 1)}" for _ in range(2)}
        for stem in stems:
            write_image(root / f"{stem}.png", (WIDTH, HEIGHT))
        num_labels = sum(write(rng, root, stem) for stem in sorted(stems))
        try:
            labelled, faults = read_set(read, root, ["crack", "hole"])
        except UserError:
            continue
        num_read += 1
        num_objects += _check_objects(labelled)
        lost = sum(faults.get(kind, 0) for kind in ("skipped_shape", "empty_object", "repeated_label"))
        assert sum(len(image.objects) for image in labelled.images()) + lost == num_labels
        assert sum(map(len, labelled.splits.values())) == len(stems)
    assert num_read > NUM_FILES / 2
    assert num_objects > NUM_FILES / 2


def _check_objects(labelled: LabelledSet) -> int:
    """Everything that may reach C code is finite and within its image."""
    count = 0
    for image in labelled.images():
        height, width = image.size_hw
        for thing in image.objects:
            x, y, w, h = thing.bbox_xywh
            assert min(w, h) > 0
            assert min(x, y) >= 0
            assert max(x + w - width, y + h - height) < 1e-6
            for part in thing.segmentation if isinstance(thing.segmentation, list) else ():
                inside = np.reshape(part, (-1, 2))
                assert ((inside >= 0) & (inside <= (width, height))).all()
            assert thing.decode(image.size_hw).shape == image.size_hw
            count += 1
    return count
