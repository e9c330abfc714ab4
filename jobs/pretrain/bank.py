"""A bank of scenes on disk: they are drawn once, because drawing takes as long as training on them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from sam3lora.data.synth.scenes import COLOURS_RGB, NATURAL, SHAPES, SHIFTED, TEXTURES, SceneObject, draw_scene

MAX_OBJECTS = 9
NOUNS = (*SHAPES, *NATURAL, *SHIFTED)
COLOURS, BLOCK = tuple(COLOURS_RGB), 256


@dataclass
class SceneBank:
    """``N`` scenes: images (N, H, W, 3) uint8, ``labels`` (N, H, W) uint8 with 0 for background and k for object k - 1,
    and for each object its noun, colour and texture as numbers (N, MAX_OBJECTS, 3) int8, -1 where there is none."""

    images: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> SceneBank:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "labels", "attributes")}
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.images)

    def fully_visible_rows(self) -> np.ndarray:
        """Scenes whose every object still shows, behind those drawn later."""
        counts = (self.attributes[:, :, 0] >= 0).sum(1)
        shown = [len(np.unique(labels[::2, ::2])) - 1 for labels in self.labels]
        return np.flatnonzero(counts <= np.array(shown))

    def textured_rows(self) -> np.ndarray:
        """(N,) bool: scenes in which a texture can be asked for (one is there, and no natural object beside it)."""
        nouns = self.attributes[:, :, 0]
        natural = np.any(np.isin(nouns, [NOUNS.index(noun) for noun in NATURAL]), axis=1)
        return np.any(self.attributes[:, :, 2] >= 0, axis=1) & ~natural

    def objects(self, row: int) -> list[SceneObject]:
        """The objects in the order of their labels."""
        labels = np.asarray(self.labels[row])
        found = []
        for number, (noun, colour, texture) in enumerate(self.attributes[row].tolist()):
            if noun < 0:
                break
            found.append(
                SceneObject(
                    NOUNS[noun],
                    COLOURS[colour] if colour >= 0 else None,
                    TEXTURES[texture] if texture >= 0 else None,
                    labels == number + 1,
                )
            )
        return found


def build_bank(
    folder: Path, count: int, *, seed: int, size: int = 224, domain: str = "base", dense: bool = False, workers: int = 2
) -> SceneBank:
    """Draw ``count`` scenes into ``folder`` unless they are there already."""
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {"images": (count, size, size, 3), "labels": (count, size, size)}
        for name, shape in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, shape)
        np.lib.format.open_memmap(folder / "attributes.npy", "w+", np.int8, (count, MAX_OBJECTS, 3))
        blocks = [
            (folder, start, min(start + BLOCK, count), seed, size, domain, dense) for start in range(0, count, BLOCK)
        ]
        if workers == 1:
            for block in blocks:
                _draw_block(*block)
        else:  # not forked: a child of a process with running threads may wait for a lock for ever
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                for job in [pool.submit(_draw_block, *block) for block in blocks]:
                    job.result()
        (folder / "done").touch()
    return SceneBank.open(folder)


def _draw_block(folder: Path, start: int, stop: int, seed: int, size: int, domain: str, dense: bool) -> None:
    cv2.setNumThreads(1)
    images, labels, attributes = (
        np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("images", "labels", "attributes")
    )
    for row in range(start, stop):
        rng = np.random.default_rng([seed, row])
        scene = draw_scene(rng, size=size, domain=domain, dense=dense, max_objects=MAX_OBJECTS if dense else 7)
        images[row] = scene.image_HW3
        attributes[row] = -1
        label_map = np.zeros((size, size), np.uint8)
        for number, thing in enumerate(scene.objects):
            label_map[thing.mask_HW] = number + 1
            attributes[row, number] = (
                NOUNS.index(thing.noun),
                COLOURS.index(thing.colour) if thing.colour else -1,
                TEXTURES.index(thing.texture) if thing.texture else -1,
            )
        labels[row] = label_map
