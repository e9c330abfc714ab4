"""The shapes that an engine runs before it is asked, so that requests do not wait for compilation or capture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count

from sam3lora.engine.detections import BoxPrompt
from sam3lora.engine.feature_cache import PreparedImage

WARM_UP_S = 30.0


def run_first_shapes(
    run: Callable[[Sequence[PreparedImage], tuple[str, ...], tuple[BoxPrompt, ...]], None],
    probe: PreparedImage,
    forget: Callable[[str], None],
    *,
    row_sizes: Sequence[int],
    image_sizes: Sequence[int],
) -> None:
    """Run each size in its order. After `WARM_UP_S` only the smallest and the largest are begun.

    Args:
        run: Asks images for prompts, with boxes.
        probe: An image that no cache holds, without features.
        forget: Drops the image of a key from the caches.
        row_sizes: Numbers of (image, prompt) pairs; one that comes again runs again.
        image_sizes: Numbers of images, each with one prompt.
    """
    end = time.monotonic() + WARM_UP_S
    numbers = count()
    middle = len(probe.pixels_RR3) / 2
    box = BoxPrompt((0, 0, middle, middle))
    for num_rows, is_first in _in_time(row_sizes, end):
        prompts = tuple(f"object {next(numbers)}" for _ in range(num_rows))  # which no cache knows
        for boxes in ((), (box,)) if is_first else ((),):
            run([probe], prompts, boxes)
    forget(probe.key)
    for num_images, _ in _in_time(image_sizes, end):
        images = [replace(probe, key=f"{probe.key} {number}") for number in range(num_images)]
        run(images, ("object",), ())
        for image in images:
            forget(image.key)


def _in_time(sizes: Sequence[int], end: float) -> Iterator[tuple[int, bool]]:
    """The sizes, and whether each comes for the first time."""
    done: set[int] = set()
    for size in sizes:
        if time.monotonic() < end or size in (1, max(sizes)):
            yield size, size not in done
            done.add(size)
