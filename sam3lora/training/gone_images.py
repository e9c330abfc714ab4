"""The end of a run whose images are gone, where `training.on_bad_image=skip` leaves out a few bad ones."""

from __future__ import annotations

from collections.abc import Sequence

from sam3lora.data.bad_images import SkippedImage
from sam3lora.data.images import ImageError

MOST_STEPS_WITHOUT_IMAGES = 10
"""Steps in a row of which no image could be read, after which a run stops."""


class StepsWithoutImages:
    """Counts the last steps, the same ones on all workers, of which no image could be read."""

    def __init__(self) -> None:
        self._num_steps = 0

    def count(self, num_images: float, skipped: Sequence[SkippedImage]) -> None:
        """Count a step of `num_images`; `skipped` are the images that it lost, of all workers.

        Raises:
            ImageError: It is the last one of too many.
        """
        self._num_steps = self._num_steps + 1 if skipped and not num_images else 0
        if self._num_steps == MOST_STEPS_WITHOUT_IMAGES:
            raise run_without_images(f"images of {self._num_steps} steps in a row", skipped)


def run_without_images(images: str, skipped: Sequence[SkippedImage]) -> ImageError:
    """What to raise where none of some images could be read."""
    return ImageError(
        f"none of the {images} could be read, the first is {skipped[0].path}: {skipped[0].reason}. Everything "
        "up to the last checkpoint is kept: make the images readable, then train again with --resume"
    )
