"""Drawing single objects of generated scenes: their outlines and surfaces (`scenes` places and paints them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Rng = np.random.Generator


@dataclass
class Drawn:
    """An object on its canvas: `mask` bool (H, W), `alpha` float (H, W), and `paint` (H, W, 3) for natural objects."""

    mask: np.ndarray
    alpha: np.ndarray
    paint: np.ndarray | None = None


def draw(rng: Rng, noun: str, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    """Draw the object called `noun`, about `extent` pixels wide, on a square canvas with sides of `size` pixels."""
    if noun in NATURAL:
        return NATURAL[noun](rng, size, centre_xy, extent)
    parts = (GEOMETRIC | SHIFTED)[noun](rng)
    matrix, offset = _transform(rng, centre_xy, extent)
    mask = _fill(size, [part @ matrix + offset for part in parts])
    return Drawn(mask > 127, _soft(mask))


def _transform(rng: Rng, centre_xy: np.ndarray, extent: float) -> tuple[np.ndarray, np.ndarray]:
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    stretch = np.diag(rng.uniform(0.86, 1.14, 2))
    return stretch @ rotation * extent / 2, np.asarray(centre_xy)


def _place(rng: Rng, points: np.ndarray, centre_xy: np.ndarray, extent: float) -> np.ndarray:
    matrix, offset = _transform(rng, centre_xy, extent)
    return points @ matrix + offset


def _fill(size: int, polygons: list[np.ndarray]) -> np.ndarray:
    """Anti-aliased even-odd filling, 0 to 255."""
    canvas = np.zeros((size, size), np.uint8)
    fixed = [np.round(points * 16).astype(np.int32) for points in polygons]
    cv2.fillPoly(canvas, fixed, 255, lineType=cv2.LINE_AA, shift=4)
    return canvas


def _soft(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.float32) / 255


def _polar(radii: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _angles(count: int) -> np.ndarray:
    return np.linspace(0, 2 * np.pi, count, endpoint=False)


def _blob(rng: Rng, roughness: float, count: int = 28) -> np.ndarray:
    angles = _angles(count)
    radii = np.full(count, 0.8)
    for harmonic in range(2, 6):
        radii += roughness / harmonic * rng.normal() * np.cos(harmonic * angles + rng.uniform(0, 6.3))
    return _polar(np.clip(radii, 0.35, 1.15), angles)


# ---- geometric objects: lists of polygons in a circle of radius 1, the first the outline, the rest holes ------------


def _circle(rng: Rng) -> list[np.ndarray]:
    return [_polar(np.full(40, 0.9), _angles(40))]


def _square(rng: Rng) -> list[np.ndarray]:
    return [np.array([[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]])]


def _triangle(rng: Rng) -> list[np.ndarray]:
    return [_polar(np.full(3, 1.08), _angles(3))]


def _star(rng: Rng) -> list[np.ndarray]:
    return [_polar(np.where(np.arange(10) % 2, 0.44, 1.1), _angles(10))]


def _ring(rng: Rng) -> list[np.ndarray]:
    return [_polar(np.full(40, 0.95), _angles(40)), _polar(np.full(32, rng.uniform(0.5, 0.58)), _angles(32))]


def _cross(rng: Rng) -> list[np.ndarray]:
    a, b = rng.uniform(0.26, 0.33), 1.0
    corners = [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a)]
    return [np.array([*corners, (-a, b)])]


GEOMETRIC: dict[str, Callable[[Rng], list[np.ndarray]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


# ---- objects of the shifted domain ----------------------------------------------------------------------------------


def _gear(rng: Rng) -> list[np.ndarray]:
    teeth = int(rng.integers(7, 11))
    angles = _angles(teeth * 4)
    return [_polar(np.where((np.arange(teeth * 4) % 4) < 2, 1.0, 0.74), angles), _polar(np.full(24, 0.3), _angles(24))]


def _arrow(rng: Rng) -> list[np.ndarray]:
    a = rng.uniform(0.16, 0.24)
    return [np.array([[1.05, 0], [0.3, 0.65], [0.3, a], [-1, a], [-1, -a], [0.3, -a], [0.3, -0.65]])]


def _bolt(rng: Rng) -> list[np.ndarray]:
    return [np.array([[0.25, -1.05], [-0.6, 0.12], [-0.06, 0.12], [-0.3, 1.05], [0.6, -0.2], [0.05, -0.2]])]


def _capsule(rng: Rng) -> list[np.ndarray]:
    r, angles = rng.uniform(0.3, 0.4), np.linspace(-np.pi / 2, np.pi / 2, 14)
    right = _polar(np.full(14, r), angles) + np.array([1 - r, 0])
    return [np.concatenate([right, -right])]


SHIFTED: dict[str, Callable[[Rng], list[np.ndarray]]] = {
    "gear": _gear,
    "arrow": _arrow,
    "bolt": _bolt,
    "capsule": _capsule,
}


# ---- natural objects ------------------------------------------------------------------------------------------------


def _colour(rng: Rng, low: tuple[float, float, float], high: tuple[float, float, float]) -> np.ndarray:
    return np.asarray(low) + rng.random() * (np.asarray(high) - np.asarray(low)) + rng.normal(0, 6, 3)


def _flat(size: int, colour: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(colour, np.float32), (size, size, 3)).copy()


def _crack(rng: Rng, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    canvas = np.zeros((size, size), np.uint8)
    heading = rng.uniform(0, 2 * np.pi)
    width = max(2, round(extent * rng.uniform(0.03, 0.06)))
    length = extent * rng.uniform(1.1, 1.6)

    def walk(start: np.ndarray, heading: float, length: float, width: int, branches: int) -> None:
        steps = max(4, int(length / 7))
        points = [start]
        for _ in range(steps):
            heading += rng.normal(0, 0.38)
            points.append(points[-1] + length / steps * np.array([np.cos(heading), np.sin(heading)]))
        fixed = np.round(np.array(points) * 16).astype(np.int32)
        cv2.polylines(canvas, [fixed], False, 255, thickness=width, lineType=cv2.LINE_AA, shift=4)
        for _ in range(branches):
            joint = points[int(rng.integers(1, steps))]
            walk(joint, heading + rng.choice([-1, 1]) * rng.uniform(0.6, 1.2), length * 0.35, max(1, width - 1), 0)

    start = np.asarray(centre_xy) - length / 2 * np.array([np.cos(heading), np.sin(heading)])
    walk(start, heading, length, width, int(rng.integers(0, 3)))
    return Drawn(canvas > 100, _soft(canvas) * 0.92, _flat(size, _colour(rng, (15, 14, 14), (55, 50, 46))))


def _hole(rng: Rng, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    points = _place(rng, _blob(rng, 0.22) * [1, rng.uniform(0.6, 1)], centre_xy, extent)
    mask = _fill(size, [points])
    depth = cv2.GaussianBlur(_soft(mask), (0, 0), max(extent * 0.09, 1.5))
    rim = np.clip(2 * depth, 0, 1)[..., None]
    wall, floor = _colour(rng, (105, 98, 92), (140, 134, 126)), _colour(rng, (24, 22, 20), (60, 55, 50))
    paint = wall * (1 - rim**2) + floor * rim**2 + rng.normal(0, 7, (size, size, 1))
    return Drawn(mask > 127, _soft(mask), paint)


def _stain(rng: Rng, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    parts = [_place(rng, _blob(rng, 0.4), centre_xy + rng.normal(0, extent * 0.1, 2), extent) for _ in range(2)]
    mask = cv2.max(_fill(size, [parts[0]]), _fill(size, [parts[1]]))
    alpha = cv2.GaussianBlur(_soft(mask), (0, 0), 1.6) * rng.uniform(0.5, 0.75)
    return Drawn(mask > 127, alpha, _flat(size, _colour(rng, (52, 34, 18), (120, 76, 36))))


def _leaf(rng: Rng, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    t = np.linspace(0, np.pi, 18)
    width = rng.uniform(0.36, 0.52)
    upper = np.stack([-np.cos(t), width * np.sin(t) ** 1.3], 1)
    outline = np.concatenate([upper, (upper * [1, -1])[::-1]])
    matrix, offset = _transform(rng, centre_xy, extent * 1.15)
    mask = _fill(size, [outline @ matrix + offset])
    green = _colour(rng, (40, 105, 30), (110, 165, 55))
    paint = _flat(size, green)
    vein = np.clip(green * 1.45 + 18, 0, 255).tolist()
    lines = [np.array([[-1, 0], [1, 0]])]
    lines += [np.array([[x, 0], [x + 0.28, side * width * 0.75]]) for x in (-0.6, -0.25, 0.1, 0.45) for side in (-1, 1)]
    for line in lines:
        a, b = np.round((line @ matrix + offset) * 16).astype(int)
        cv2.line(paint, a.tolist(), b.tolist(), vein, 1, cv2.LINE_AA, 4)
    return Drawn(mask > 127, _soft(mask), paint)


def _berry(rng: Rng, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    matrix, offset = _transform(rng, centre_xy, extent * 0.85)
    angles = _angles(36)
    outline = _polar(0.95 - 0.12 * np.cos(angles), angles)
    mask = _fill(size, [outline @ matrix + offset])
    red = (
        _colour(rng, (150, 18, 36), (225, 50, 55)) if rng.random() < 0.7 else _colour(rng, (70, 20, 80), (110, 40, 120))
    )
    yy, xx = np.mgrid[:size, :size]
    light = offset - 0.18 * extent
    shade = 1.15 - 0.55 * np.hypot(xx - light[0], yy - light[1]) / extent
    paint = (red[None, None] * shade[..., None]).astype(np.float32)
    for _ in range(14):
        spot = (_polar(np.sqrt(rng.random(1)) * 0.75, rng.uniform(0, 6.3, 1)) @ matrix + offset)[0]
        cv2.circle(paint, np.round(spot).astype(int).tolist(), 1, (235.0, 205.0, 120.0), -1)
    cap = _polar(np.where(np.arange(10) % 2, 0.14, 0.42), _angles(10)) + np.array([-0.8, 0])
    cap_mask = _fill(size, [cap @ matrix + offset])
    paint[cap_mask > 127] = _colour(rng, (40, 110, 35), (80, 150, 60))
    return Drawn((mask > 127) | (cap_mask > 127), np.maximum(_soft(mask), _soft(cap_mask)), paint)


def _flower(rng: Rng, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    petals = int(rng.integers(5, 9))
    angles = _angles(96)
    matrix, offset = _transform(rng, centre_xy, extent)
    outline = _polar(0.68 + 0.32 * np.abs(np.cos(petals * angles / 2)) ** 0.7 - 0.1, angles)
    mask = _fill(size, [outline @ matrix + offset])
    tint = [(235, 235, 235), (245, 205, 60), (230, 120, 190), (170, 110, 225)][int(rng.integers(4))]
    paint = _flat(size, np.asarray(tint) + rng.normal(0, 8, 3))
    for angle in _angles(petals) + np.pi / petals:
        tip = (_polar(np.array([0.85]), np.array([angle])) @ matrix + offset)[0]
        shade = np.clip(np.asarray(tint) * 0.72, 0, 255).tolist()
        cv2.line(
            paint, np.round(offset).astype(int).tolist(), np.round(tip).astype(int).tolist(), shade, 2, cv2.LINE_AA
        )
    heart = (210.0, 140.0, 30.0) if tint[2] > 100 else (120.0, 60.0, 25.0)
    cv2.circle(paint, np.round(offset).astype(int).tolist(), max(2, int(extent * 0.14)), heart, -1, cv2.LINE_AA)
    return Drawn(mask > 127, _soft(mask), paint)


def _stone(rng: Rng, size: int, centre_xy: np.ndarray, extent: float) -> Drawn:
    points = _place(rng, _blob(rng, 0.16, 9), centre_xy, extent)
    mask = _fill(size, [points])
    grey = _colour(rng, (105, 103, 100), (185, 182, 178))
    yy, xx = np.mgrid[:size, :size]
    slope = ((xx - centre_xy[0]) + (yy - centre_xy[1])) / extent
    facets = cv2.resize(rng.normal(0, 12, (10, 10)).astype(np.float32), (size, size), interpolation=cv2.INTER_NEAREST)
    paint = grey[None, None] * (1 - 0.3 * slope[..., None]) + facets[..., None] + rng.normal(0, 10, (size, size, 1))
    return Drawn(mask > 127, _soft(mask), paint)


NATURAL: dict[str, Callable[[Rng, int, np.ndarray, float], Drawn]] = {
    "crack": _crack,
    "hole": _hole,
    "stain": _stain,
    "leaf": _leaf,
    "berry": _berry,
    "flower": _flower,
    "stone": _stone,
}
