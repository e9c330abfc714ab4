"""Ranking of a split's images: the best, the worst, and those on which models differ most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from sam3lora.evaluation.metrics.cgf1 import UnitCounts, count_unit
from sam3lora.evaluation.metrics.cgf1_units import Units
from sam3lora.evaluation.split_results import Pair


@dataclass(frozen=True)
class MatchCounts:
    """Right and wrong detections and missed objects; a detection is right if its object has mask IoU >= 0.5 with it."""

    num_right: int = 0
    num_wrong: int = 0
    num_missed: int = 0

    @classmethod
    def from_counts(cls, counts: UnitCounts) -> MatchCounts:
        right = int(counts.true_positives_K[0])
        return cls(right, counts.num_detections - right, counts.num_targets - right)

    def __add__(self, other: MatchCounts) -> MatchCounts:
        return MatchCounts(
            self.num_right + other.num_right, self.num_wrong + other.num_wrong, self.num_missed + other.num_missed
        )

    @property
    def num_errors(self) -> int:
        return self.num_wrong + self.num_missed

    @property
    def quality(self) -> float:
        """F1 in [0, 1], 2 right / (2 right + wrong + missed); 1 without objects and detections."""
        return 2 * self.num_right / (2 * self.num_right + self.num_errors) if self.num_right + self.num_errors else 1.0


def count_matches(units: Units, thresholds: Mapping[int, float]) -> dict[Pair, MatchCounts]:
    """Right, wrong and missed for each category (with its threshold) in each image, matched as for cgF1."""
    return {pair: MatchCounts.from_counts(count_unit(unit, thresholds[pair[1]])) for pair, unit in units.items()}


def sum_categories(counts: Mapping[Pair, MatchCounts]) -> dict[int, MatchCounts]:
    """Sum over the categories of each image."""
    totals: dict[int, MatchCounts] = defaultdict(MatchCounts)
    for (image, _), entry in counts.items():
        totals[image] += entry
    return dict(totals)


def worst_images(totals: Mapping[int, MatchCounts], count: int) -> list[int]:
    """Ids of images with errors by ascending quality; of equals first those with more errors, then the earlier."""
    flawed = [image for image, entry in totals.items() if entry.num_errors]
    return sorted(flawed, key=lambda image: (totals[image].quality, -totals[image].num_errors))[:count]


def best_images(totals: Mapping[int, MatchCounts], count: int) -> list[int]:
    """Ids of images with a right detection by descending quality; of equals first those with more right detections."""
    found = [image for image, entry in totals.items() if entry.num_right]
    return sorted(found, key=lambda image: (-totals[image].quality, -totals[image].num_right))[:count]


def false_alarms(
    ground_truth: Mapping[str, Any], predictions: Iterable[Mapping[str, Any]], thresholds: Mapping[int, float]
) -> dict[Pair, float]:
    """(image, absent category) pairs with a detection at the threshold -> best score, by descending score.

    A category of which the image has only crowd regions counts as present.
    """
    present = {(entry["image_id"], entry["category_id"]) for entry in ground_truth["annotations"]}
    alarms: dict[Pair, float] = {}
    for prediction in sorted(predictions, key=lambda entry: -entry["score"]):
        pair = (prediction["image_id"], prediction["category_id"])
        if prediction["score"] >= thresholds[pair[1]] and pair not in present:
            alarms.setdefault(pair, prediction["score"])
    return alarms


def most_different_images(category: int, models: Sequence[Mapping[Pair, MatchCounts]], count: int) -> list[int]:
    """Ids of the images on which the models' quality for a category differs most; of equals, more objects come first.

    Images that show the category alternate with images where it is absent but detected. Images without object and
    detection of it are left out.
    """
    present: dict[int, tuple[float, int]] = {}
    absent: dict[int, tuple[float, int]] = {}
    for (image, of_category), first in models[0].items():
        counts = [model[image, of_category] for model in models]
        num_objects = first.num_right + first.num_missed
        if of_category == category and (num_objects or any(entry.num_wrong for entry in counts)):
            qualities = [entry.quality for entry in counts]
            (present if num_objects else absent)[image] = (min(qualities) - max(qualities), -num_objects)
    ranked = (sorted(keys, key=keys.__getitem__) for keys in (present, absent))
    return [image for turn in zip_longest(*ranked) for image in turn if image is not None][:count]
