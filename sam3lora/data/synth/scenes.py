"""Generated scenes with named objects: the training images of the built-in tiny SAM 3, and the demo's data.

A scene is a background with a few objects. Each object has an exact mask and its words. A geometric object has a
colour, a shape and sometimes a texture ("red star", "striped thing"); a natural one has its own look ("crack", "leaf").
The `shift` domain has objects and backgrounds that the tiny model never saw: the demo trains an adapter on them.
All random numbers come from one `numpy.random.Generator`, so equal seeds give equal scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from sam3lora.data.synth import shapes

COLOURS_RGB = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (240, 215, 40),
    "green": (45, 165, 60),
    "blue": (40, 90, 215),
    "purple": (140, 50, 180),
    "white": (242, 242, 242),
    "black": (22, 22, 24),
}
TEXTURES = ("striped", "dotted", "checkered")
SHAPES = tuple(shapes.GEOMETRIC)
NATURAL = tuple(shapes.NATURAL)
SHIFTED = tuple(shapes.SHIFTED)
# Colours that a natural object may appear to have: a scene with such an object is not asked for them.
NATURAL_COLOURS = {
    "crack": ("black",),
    "hole": ("black",),
    "stain": ("black", "orange"),
    "leaf": ("green", "yellow"),
    "berry": ("red", "purple", "green"),
    "flower": ("yellow", "white", "purple", "orange"),
    "stone": ("white",),
}


@dataclass
class SceneObject:
    """One object: its noun, its attributes (None where they do not apply) and its visible mask."""

    noun: str
    colour: str | None
    texture: str | None
    mask_HW: np.ndarray = field(repr=False)

    @property
    def box_xywh(self) -> tuple[int, int, int, int]:
        x, y, w, h = cv2.boundingRect(self.mask_HW.astype(np.uint8))
        return x, y, w, h


@dataclass
class Scene:
    """An RGB image (H, W, 3) uint8 and its objects, the later ones in front."""

    image_HW3: np.ndarray = field(repr=False)
    objects: list[SceneObject]


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """What a prompt asks for; `kind` is one of natural, shape, colour, texture, colour+shape."""

    kind: str
    noun: str | None = None
    colour: str | None = None
    texture: str | None = None

    @property
    def prompt(self) -> str:
        return " ".join(word for word in (self.colour or self.texture, self.noun or "thing") if word)

    def matches(self, thing: SceneObject) -> bool:
        return (
            (self.noun is None or self.noun == thing.noun)
            and (self.colour is None or self.colour == thing.colour)
            and (self.texture is None or self.texture == thing.texture)
        )

    def is_ambiguous_in(self, objects: list[SceneObject]) -> bool:
        """Whether a natural object might count: as one of this colour, or as one with a texture."""
        nouns = {thing.noun for thing in objects}
        if self.kind == "colour":
            return any(self.colour in NATURAL_COLOURS.get(noun, ()) for noun in nouns)
        return self.kind == "texture" and any(noun in NATURAL for noun in nouns)


def concepts_of(thing: SceneObject) -> list[Concept]:
    """All concepts that the object matches."""
    if thing.colour is None:
        return [Concept("natural", noun=thing.noun)]
    named = [
        Concept("shape", noun=thing.noun),
        Concept("colour", colour=thing.colour),
        Concept("colour+shape", noun=thing.noun, colour=thing.colour),
    ]
    return named + ([Concept("texture", texture=thing.texture)] if thing.texture else [])


ALL_CONCEPTS = (
    [Concept("natural", noun=noun) for noun in NATURAL]
    + [Concept("shape", noun=noun) for noun in SHAPES]
    + [Concept("colour", colour=colour) for colour in COLOURS_RGB]
    + [Concept("texture", texture=texture) for texture in TEXTURES]
    + [Concept("colour+shape", noun=noun, colour=colour) for noun in SHAPES for colour in COLOURS_RGB]
)
WORDS = (*COLOURS_RGB, *TEXTURES, *SHAPES, *NATURAL, "thing", "visual")


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw_scene(
    rng: np.random.Generator, *, size: int = 224, domain: str = "base", max_objects: int = 7, dense: bool = False
) -> Scene:
    """Draw one scene of `size` x `size` pixels with at least one object.

    Args:
        domain: "base", or "shift" for objects and backgrounds unknown to the tiny model.
        dense: Fill the image with objects, to train a model on as many per image as possible.
    """
    image = (_shifted_background if domain == "shift" else _background)(rng, size).astype(np.float32)
    wanted = max_objects if dense else 1 + min(int(rng.poisson(2.8)), max_objects - 1)
    palette = _scene_palette(rng, wanted, domain)
    taken = np.zeros((size, size), bool)
    objects: list[SceneObject] = []
    for noun, colour, texture in palette:
        for _ in range(12):
            extent = size * rng.uniform(*((0.2, 0.34) if dense else (0.2, 0.46)))
            centre = rng.uniform(0.12 * size, 0.88 * size, 2)
            drawn = shapes.draw(rng, noun, size, centre, extent)
            area = drawn.mask.sum()
            if area < 0.0012 * size * size or (drawn.mask & taken).sum() > 0.08 * area:
                continue
            _paint(rng, image, drawn, colour, texture)
            for other in objects:
                other.mask_HW &= ~drawn.mask
            taken |= drawn.mask
            objects.append(SceneObject(noun, colour, texture, drawn.mask))
            break
    objects = [thing for thing in objects if thing.mask_HW.sum() > 0.0008 * size * size]  # drop almost hidden ones
    if not objects:
        return draw_scene(rng, size=size, domain=domain, max_objects=max_objects, dense=dense)
    return Scene(_camera(rng, image), objects)


def draw_empty(rng: np.random.Generator, *, size: int = 224, domain: str = "base") -> Scene:
    """Draw a background without objects, where every prompt is absent."""
    image = (_shifted_background if domain == "shift" else _background)(rng, size)
    return Scene(_camera(rng, image), [])


def _scene_palette(rng: np.random.Generator, wanted: int, domain: str) -> list[tuple[str, str | None, str | None]]:
    """(noun, colour, texture) of the objects: a few concepts, with repeats and others that share an attribute."""
    chosen: list[tuple[str, str | None, str | None]] = []
    while len(chosen) < wanted:
        roll = rng.random()
        if chosen and roll < 0.25:
            chosen.append(chosen[rng.integers(len(chosen))])
            continue
        if domain == "shift":
            noun = SHIFTED[rng.integers(len(SHIFTED))]
            chosen.append((noun, _pick(rng, COLOURS_RGB), None))
            continue
        geometric = [entry for entry in chosen if entry[1]]
        if geometric and roll < 0.65:
            noun, colour, texture = geometric[rng.integers(len(geometric))]
            if rng.random() < 0.5:
                noun = _pick(rng, SHAPES)
            else:
                colour = _pick(rng, COLOURS_RGB)
            chosen.append((noun, colour, texture if rng.random() < 0.5 else _texture(rng)))
        elif rng.random() < 0.36:
            chosen.append((_pick(rng, NATURAL), None, None))
        else:
            chosen.append((_pick(rng, SHAPES), _pick(rng, COLOURS_RGB), _texture(rng)))
    return chosen


def _pick(rng: np.random.Generator, options) -> str:
    return tuple(options)[rng.integers(len(options))]


def _texture(rng: np.random.Generator) -> str | None:
    return _pick(rng, TEXTURES) if rng.random() < 0.45 else None


def _paint(rng: np.random.Generator, image: np.ndarray, drawn: shapes.Drawn, colour: str | None, texture: str | None):
    """Blend the object into the image, in place."""
    x, y, w, h = cv2.boundingRect(drawn.mask.astype(np.uint8))
    window = (slice(max(y - 2, 0), y + h + 2), slice(max(x - 2, 0), x + w + 2))
    alpha = drawn.alpha[window].astype(np.float32)
    if colour is None:
        assert drawn.paint is not None  # natural objects have no colour, but paint of their own
        paint = drawn.paint[window].astype(np.float32)
    else:
        paint = _coloured(rng, alpha.shape, colour, texture)
    shade = 1 + rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, alpha.shape[1], dtype=np.float32)
    if rng.random() < 0.4:  # a soft shadow
        shadow = cv2.GaussianBlur(np.roll(alpha, (3, 3), (0, 1)), (7, 7), 0)[..., None] * 0.35
        image[window] *= 1 - shadow
    image[window] += alpha[..., None] * (paint * shade[None, :, None] - image[window])


def _coloured(rng: np.random.Generator, shape_hw: tuple[int, int], colour: str, texture: str | None) -> np.ndarray:
    base = np.array(COLOURS_RGB[colour], np.float32) + rng.normal(0, 9, 3).astype(np.float32)
    paint = np.broadcast_to(base, (*shape_hw, 3)).copy()
    if texture:
        luminance = base.mean()
        other = base * 0.42 if luminance > 95 else base * 0.45 + 130
        yy, xx = np.mgrid[: shape_hw[0], : shape_hw[1]].astype(np.float32)
        turn = rng.uniform(0, np.pi)
        along, across = xx * np.cos(turn) + yy * np.sin(turn), yy * np.cos(turn) - xx * np.sin(turn)
        period = rng.uniform(8, 13)
        if texture == "striped":
            pattern = (along % period) < period * 0.45
        elif texture == "dotted":
            pattern = np.hypot(along % period - period / 2, across % period - period / 2) < period * 0.3
        else:
            pattern = ((along // period + across // period) % 2) < 1
        paint[pattern] = other
    return paint


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Muted noise at several scales, sometimes with a gradient, waves or a grid."""
    base = np.full((size, size, 3), rng.uniform(70, 190), np.float32) + rng.normal(0, 14, 3)
    for cells, strength in ((3, 18), (9, 12), (30, 8)):
        coarse = rng.normal(0, rng.uniform(0.2, 1) * strength, (cells, cells, 1 if rng.random() < 0.6 else 3))
        noise = cv2.resize(coarse.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        base += noise if noise.ndim == 3 else noise[..., None]
    kind = rng.integers(5)
    yy, xx = np.mgrid[:size, :size].astype(np.float32) / size
    turn = rng.uniform(0, np.pi)
    along = xx * np.cos(turn) + yy * np.sin(turn)
    if kind == 1:
        base += (along[..., None] - 0.5) * rng.uniform(20, 70)
    elif kind == 2:
        base += np.sin(along * rng.uniform(12, 60))[..., None] * rng.uniform(3, 12)
    elif kind == 3:
        cell = rng.uniform(0.12, 0.3)
        base -= (((xx % cell) < 0.008) | ((yy % cell) < 0.008))[..., None] * rng.uniform(8, 30)
    return base


def _shifted_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Weave, wood or speckle, which the tiny model never saw."""
    yy, xx = np.mgrid[:size, :size].astype(np.float32)
    kind = rng.integers(3)
    if kind == 0:
        period = rng.uniform(6, 12)
        weave = np.sin(xx * 2 * np.pi / period) * np.sign(np.sin(yy * np.pi / period))
        base = rng.uniform(90, 170) + weave[..., None] * rng.uniform(10, 25) + rng.normal(0, 10, 3)
    elif kind == 1:
        wobble = cv2.resize(rng.normal(0, 1, (6, 6)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        rings = np.sin(yy * rng.uniform(0.15, 0.35) + wobble * 4)
        base = np.array([165, 118, 70], np.float32) + rings[..., None] * np.array([22, 18, 12]) + rng.normal(0, 8, 3)
    else:
        speckle: np.ndarray = (rng.random((size, size)) < 0.06).astype(np.float32)
        speckle = cv2.GaussianBlur(speckle, (3, 3), 0)
        base = rng.uniform(80, 180) + speckle[..., None] * rng.uniform(-160, 160) + rng.normal(0, 10, 3)
    return np.broadcast_to(base, (size, size, 3)).astype(np.float32)


def _camera(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Lighting, blur and sensor noise."""
    image = image * rng.uniform(0.85, 1.12)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.4, 0.9))
    if rng.random() < 0.7:
        image = image + rng.normal(0, rng.uniform(1, 6), image.shape[:2])[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)
