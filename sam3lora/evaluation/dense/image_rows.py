"""`ImageRows`: one small array for each image of a set, kept under the image's id."""

from __future__ import annotations

import numpy as np


class ImageRows:
    """Arrays of one shape by image id. Their order is that of the ids, whichever worker measured which image.

    Args:
        shape: Shape of a row.
        dtype: Type of a row.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type = np.float64) -> None:
        self.shape = shape
        self.dtype = dtype
        self._rows: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_ids(self) -> list[int]:
        return sorted(self._rows)

    def add(self, image_id: int, row: np.ndarray) -> None:
        """Keep the row of an image.

        Raises:
            ValueError: The image has a row already, so it would count twice.
        """
        if image_id in self._rows:
            raise ValueError(f"expected every image once, got image {image_id} again")
        self._rows[image_id] = np.asarray(row, dtype=self.dtype).reshape(self.shape)

    def merge(self, other: ImageRows) -> None:
        """Take over the rows of other images.

        Raises:
            ValueError: An image has a row on both sides.
        """
        both = sorted(self._rows.keys() & other._rows.keys())
        if both:
            raise ValueError(f"expected every image once, got image {both[0]} from two workers")
        self._rows |= other._rows

    def stacked(self) -> np.ndarray:
        """The rows (I, ...) in the order of `image_ids`."""
        if not self._rows:
            return np.zeros((0, *self.shape), dtype=self.dtype)
        return np.stack([self._rows[image_id] for image_id in self.image_ids])
