"""Which images of a split went best and worst at a score threshold, and where two models differ most."""

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
class Tally:
    """Detections right and wrong, and objects missed; right is a detection matched to an object by mask IoU >= 0.5."""

    num_right: int = 0
    num_wrong: int = 0
    num_missed: int = 0

    @classmethod
    def from_counts(cls, counts: UnitCounts) -> Tally:
        right = int(counts.true_positives_K[0])
        return cls(right, counts.num_detections - right, counts.num_targets - right)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.num_right + other.num_right, self.num_wrong + other.num_wrong, self.num_missed + other.num_missed
        )

    @property
    def num_errors(self) -> int:
        return self.num_wrong + self.num_missed

    @property
    def quality(self) -> float:
        """F1 in [0, 1]: 2 right / (2 right + wrong + missed); 1 where nothing is to be found and nothing was."""
        return 2 * self.num_right / (2 * self.num_right + self.num_errors) if self.num_right + self.num_errors else 1.0


def tally_pairs(units: Units, thresholds: Mapping[int, float]) -> dict[Pair, Tally]:
    """Right, wrong and missed of every category in every image, matched as cgF1 does.

    Args:
        units: Of `split_units`.
        thresholds: Category id -> lowest score that counts.
    """
    return {pair: Tally.from_counts(count_unit(unit, thresholds[pair[1]])) for pair, unit in units.items()}


def tally_images(tallies: Mapping[Pair, Tally]) -> dict[int, Tally]:
    """Sum over the categories of each image."""
    totals: dict[int, Tally] = defaultdict(Tally)
    for (image, _), tally in tallies.items():
        totals[image] += tally
    return dict(totals)


def worst_images(totals: Mapping[int, Tally], count: int) -> list[int]:
    """Ids of images with errors by rising quality; of equal ones that with more errors, then the earlier."""
    flawed = [image for image, tally in totals.items() if tally.num_errors]
    return sorted(flawed, key=lambda image: (totals[image].quality, -totals[image].num_errors))[:count]


def best_images(totals: Mapping[int, Tally], count: int) -> list[int]:
    """Ids of images in which something was found, by falling quality; of equal ones that with more objects first."""
    found = [image for image, tally in totals.items() if tally.num_right]
    return sorted(found, key=lambda image: (-totals[image].quality, -totals[image].num_right))[:count]


def false_alarms(
    ground_truth: Mapping[str, Any], predictions: Iterable[Mapping[str, Any]], thresholds: Mapping[int, float]
) -> dict[Pair, float]:
    """Absent categories with a detection at the threshold -> best score, by falling score.

    A category of which the image has crowd regions only counts as present.
    """
    present = {(entry["image_id"], entry["category_id"]) for entry in ground_truth["annotations"]}
    alarms: dict[Pair, float] = {}
    for prediction in sorted(predictions, key=lambda entry: -entry["score"]):
        pair = (prediction["image_id"], prediction["category_id"])
        if prediction["score"] >= thresholds[pair[1]] and pair not in present:
            alarms.setdefault(pair, prediction["score"])
    return alarms


def telling_images(category: int, models: Sequence[Mapping[Pair, Tally]], count: int) -> list[int]:
    """Ids of the images where the models differ most in quality on a category, of equal ones that with more objects.

    Images that show the category take turns with those where it was found although absent; images in which it neither
    is nor was found are left out.

    Args:
        category: Category id.
        models: `tally_pairs` of two models or more on the same split.
        count: At most so many.
    """
    present: dict[int, tuple[float, int]] = {}
    absent: dict[int, tuple[float, int]] = {}
    for (image, of_category), first in models[0].items():
        tallies = [model[image, of_category] for model in models]
        num_objects = first.num_right + first.num_missed
        if of_category == category and (num_objects or any(tally.num_wrong for tally in tallies)):
            qualities = [tally.quality for tally in tallies]
            (present if num_objects else absent)[image] = (min(qualities) - max(qualities), -num_objects)
    ranked = (sorted(keys, key=keys.__getitem__) for keys in (present, absent))
    return [image for turn in zip_longest(*ranked) for image in turn if image is not None][:count]
