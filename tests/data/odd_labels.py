"""Annotations and results with everything that files hold, drawn at random."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from sam3lora.data.rle import encode_rle

WIDTH, HEIGHT = 100, 80

NUMBERS = [
    0,
    1,
    -1,
    0.5,
    1e-300,
    10,
    99.5,
    100,
    1e3,
    -1e5,
    2e8,
    3.5e9,
    1e18,
    1e300,
    10**400,
    float("nan"),
    float("inf"),
]
NO_NUMBERS = [None, True, "", "10", "x", [], [1], {}, {"a": 1}]
FLAGS = [0, 0, 0, 1, "0", "1", True, False, None, 0.0, "no", 2, "maybe", [], "2" * 300]
IDS = [
    None,
    -5,
    1.0,
    1.5,
    "1",
    "007",
    "a",
    "a ",
    "",
    2**63,
    -(2**70),
    1e30,
    float("nan"),
    True,
    [1],
    {},
    "9" * 5000,
    "\ud800",
]


def odd_annotation(rng: random.Random, number: int, num_images: int) -> Any:
    """One entry of `annotations`, or of a results file (`score`): in half of the cases nothing is wrong with it."""
    x, y = rng.uniform(0, 70), rng.uniform(0, 50)
    side = rng.uniform(2, 28)
    entry: dict[str, Any] = {
        "id": number,
        "image_id": rng.randrange(num_images),
        "category_id": rng.randint(1, 3),
        "bbox": [x, y, side, side],
        "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
        "area": side * side,
        "iscrowd": 0,
        "score": rng.random(),
    }
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        field = rng.choice(
            ("id", "image_id", "category_id", "bbox", "segmentation", "segmentation", "iscrowd", "score")
        )
        if rng.random() < 0.1:
            del_field(entry, field)
        elif field in ("id", "image_id", "category_id"):
            entry[field] = rng.choice(IDS) if rng.random() < 0.3 else rng.randrange(num_images + 2)
        elif field == "iscrowd":
            entry[field] = rng.choice(FLAGS)
        elif field == "score":
            entry[field] = rng.choice(NUMBERS + NO_NUMBERS) if rng.random() < 0.5 else rng.random()
        else:
            entry[field] = odd_box(rng) if field == "bbox" else odd_mask(rng)
    return rng.choice([None, [], "text", 5, [entry], {"image_id": 0}]) if rng.random() < 0.01 else entry


def del_field(entry: dict[str, Any], field: str) -> None:
    entry.pop(field, None)


def odd_box(rng: random.Random) -> Any:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(NO_NUMBERS)
    if kind == 1:  # in shares of the image
        return [rng.random() / 2 for _ in range(4)]
    return [odd_number(rng) for _ in range(rng.choice((4, 4, 4, 2, 5)))]


def odd_mask(rng: random.Random) -> Any:
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice([*NO_NUMBERS, [[]], [[[]]], [{}], [[1, 2], [3, 4]], "[[1,2,3,4,5,6]]"])
    if kind == 1:
        return odd_rle(rng)
    if kind == 2:
        return [odd_rle(rng) for _ in range(rng.randint(1, 3))]
    points = [[odd_number(rng) if rng.random() < 0.2 else rng.uniform(0, 90) for _ in range(2)] for _ in range(4)]
    flat = [value for point in points for value in point]
    if kind == 3:
        return points
    if kind == 4:
        return [points, [[points]]]
    if kind == 5:
        return flat
    if kind == 6:
        return [flat, [1, 2, 3, 4], flat[:5], odd_rle(rng)]
    if kind == 7:  # in shares of the image
        return [[rng.random() for _ in range(8)]]
    if kind == 8:  # an outline without end
        return (
            [[rng.choice((0, 1e9)) for _ in range(200)]]
            if rng.random() < 0.5
            else [[rng.uniform(-50, 150) for _ in range(5000)]]
        )
    return [flat]


def odd_rle(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.4:
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        x, y = rng.randrange(WIDTH), rng.randrange(HEIGHT)
        mask[y : y + rng.randint(0, 30), x : x + rng.randint(0, 30)] = True
        rle = encode_rle(mask)
        return rle if rng.random() < 0.7 else rle | {"counts": rle["counts"][: rng.randrange(8)] + rng.choice("@oP0")}
    height, width = rng.choice(
        ((HEIGHT, WIDTH), (HEIGHT, WIDTH), (40, 50), (0, 5), (10**9, 10**9), (7.0, 9.0), ("8", 8))
    )
    total = int(height) * int(width) if isinstance(height, int | float) else 64
    counts = rng.choice(
        (
            [total // 3, total // 3, total - 2 * (total // 3)],
            [float(total // 2), float(total - total // 2)],
            [total],
            [2**40, -(2**40), total],
            [5, float("nan")],
            "".join(chr(rng.randint(40, 120)) for _ in range(rng.randint(0, 30))),
            "PPYo0" + "o" * rng.randint(0, 50),
            None,
            "é\ud800",
        )
    )
    return {"size": [height, width], "counts": counts}


def odd_number(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return rng.choice(NO_NUMBERS)
    return rng.choice(NUMBERS) if rng.random() < 0.5 else rng.uniform(-50, 150)
