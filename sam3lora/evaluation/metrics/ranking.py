"""Ranking of a split's images: the best, the worst, and those on which models differ most.

Images and categories are named by their positions. Shapes: `I` images, `C` categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from sam3lora.evaluation.metrics.cgf1_units import SplitCounts


@dataclass(frozen=True)
class MatchCounts:
    """Right and wrong detections and missed objects; a detection is right if its object has mask IoU >= 0.5 with it."""

    num_right: int = 0
    num_wrong: int = 0
    num_missed: int = 0

    @property
    def num_errors(self) -> int:
        return self.num_wrong + self.num_missed

    @property
    def quality(self) -> float:
        """F1 in [0, 1], 2 right / (2 right + wrong + missed); 1 without objects and detections."""
        return 2 * self.num_right / (2 * self.num_right + self.num_errors) if self.num_right + self.num_errors else 1.0


@dataclass(frozen=True)
class PairCounts:
    """Right, wrong and missed for each category in each image; zeros where it is not judged."""

    right_IC: np.ndarray
    wrong_IC: np.ndarray
    missed_IC: np.ndarray

    @classmethod
    def of(cls, counts: SplitCounts) -> PairCounts:
        """Matched as for cgF1."""
        right_U = counts.true_positives_UK[:, 0]
        tables = [np.zeros(counts.is_negative_IC.shape, np.int32) for _ in range(3)]
        for table_IC, values_U in zip(
            tables, (right_U, counts.num_detections_U - right_U, counts.num_targets_U - right_U), strict=True
        ):
            table_IC[counts.pairs_U2[:, 0], counts.pairs_U2[:, 1]] = values_U
        return cls(*tables)

    def pair(self, image: int, category: int) -> MatchCounts:
        return MatchCounts(*(int(table_IC[image, category]) for table_IC in self._tables))

    def images(self) -> list[MatchCounts]:
        """Sum over the categories of each image."""
        return [MatchCounts(*values) for values in zip(*(t.sum(axis=1).tolist() for t in self._tables), strict=True)]

    def total(self) -> MatchCounts:
        return MatchCounts(*(int(table_IC.sum()) for table_IC in self._tables))

    @property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.right_IC, self.wrong_IC, self.missed_IC


def worst_images(totals: Sequence[MatchCounts], count: int) -> list[int]:
    """Images with errors by ascending quality; of equals first those with more errors, then the earlier."""
    flawed = [image for image, entry in enumerate(totals) if entry.num_errors]
    return sorted(flawed, key=lambda image: (totals[image].quality, -totals[image].num_errors))[:count]


def best_images(totals: Sequence[MatchCounts], count: int) -> list[int]:
    """Images with a right detection by descending quality; of equals first those with more right detections."""
    found = [image for image, entry in enumerate(totals) if entry.num_right]
    return sorted(found, key=lambda image: (-totals[image].quality, -totals[image].num_right))[:count]


def false_alarms(best_score_IC: np.ndarray, is_alarm_IC: np.ndarray) -> list[tuple[int, int]]:
    """The pairs with a false alarm, by descending score of the best detection."""
    pairs_N2 = np.argwhere(is_alarm_IC)
    order = np.argsort(-best_score_IC[pairs_N2[:, 0], pairs_N2[:, 1]], kind="stable")
    return [(image, category) for image, category in pairs_N2[order].tolist()]


def most_different_images(category: int, models: Sequence[PairCounts], count: int) -> list[int]:
    """Images on which the models' quality for a category differs most; of equals, more objects come first.

    Images that show the category alternate with images where it is absent but detected. Images without object and
    detection of it are left out.
    """
    present: dict[int, tuple[float, int]] = {}
    absent: dict[int, tuple[float, int]] = {}
    num_objects_I = models[0].right_IC[:, category] + models[0].missed_IC[:, category]
    is_wrong_I = np.any([model.wrong_IC[:, category] > 0 for model in models], axis=0)
    for image in np.flatnonzero((num_objects_I > 0) | is_wrong_I).tolist():
        qualities = [model.pair(image, category).quality for model in models]
        num_objects = int(num_objects_I[image])
        (present if num_objects else absent)[image] = (min(qualities) - max(qualities), -num_objects)
    ranked = (sorted(keys, key=keys.__getitem__) for keys in (present, absent))
    return [image for turn in zip_longest(*ranked) for image in turn if image is not None][:count]
