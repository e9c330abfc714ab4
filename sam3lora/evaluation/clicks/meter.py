"""`ClickMeter`: how many clicks objects take, and how good masks are after so many, with intervals.

    NoC@t   mean over objects of the first k with IoU_k >= t, the most clicks allowed if there is none
    NoF@t   objects that never reach t
    mIoU@k  mean over objects of the IoU after k clicks, whether or not they were good enough before

An object that is good enough before any click, as a detector found it, takes 0 clicks.

Shapes: `I` images with an object, `N` objects, `K` clicks at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from sam3lora.data.rle import rle_difference
from sam3lora.engine.mask_codes import Rle, rle_area_px
from sam3lora.evaluation.clicks.simulated_user import MAX_CLICKS, ObjectRun
from sam3lora.evaluation.metrics.bootstrap import (
    Interval,
    Metrics,
    ValueInterval,
    bootstrap_differences,
    bootstrap_values,
)

THRESHOLDS = (80, 85, 90)
"""IoU in percent of NoC and NoF."""
REPORTED_CLICKS = (1, 2, 3, 5, 8, 20)
"""Numbers of clicks of mIoU."""
LEAST_SHARE = 1e-4
"""Share of the image's pixels below which an object is left out."""


def is_measured(truth: Rle, ignored: Rle | None = None) -> bool:
    """Whether an object is large enough, outside of the ignored pixels, to be clicked on."""
    area_px = rle_area_px(truth if ignored is None else rle_difference(truth, ignored))
    height, width = truth["size"]
    return area_px > 0 and area_px >= LEAST_SHARE * (height * width)


class ClickMeter:
    """Measures of runs, one object at a time.

    Args:
        max_clicks: Of every run.
    """

    def __init__(self, max_clicks: int = MAX_CLICKS) -> None:
        self.max_clicks = max_clicks
        self._runs: dict[tuple[int, int], ObjectRun] = {}
        self._left_out: set[tuple[int, int]] = set()

    def add(self, run: ObjectRun, *, image_id: int, object_id: int) -> None:
        """Measure an object; the id of an object needs to be unique in its image only.

        Raises:
            ValueError: The object was added before, or the run allowed another number of clicks.
        """
        if len(run.ious) != self.max_clicks + 1:
            raise ValueError(f"expected runs of up to {self.max_clicks} clicks, got {len(run.ious) - 1}")
        self._check_new([(image_id, object_id)])
        self._runs[image_id, object_id] = run

    def leave_out(self, *, image_id: int, object_id: int) -> None:
        """Count an object that is too small (see `is_measured`)."""
        self._check_new([(image_id, object_id)])
        self._left_out.add((image_id, object_id))

    def merge(self, other: ClickMeter) -> None:
        """Add what another worker measured.

        Raises:
            ValueError: An object was measured on both sides, or the numbers of clicks differ.
        """
        if other.max_clicks != self.max_clicks:
            raise ValueError(f"expected runs of up to {self.max_clicks} clicks, got {other.max_clicks}")
        self._check_new([*other._runs, *other._left_out])
        self._runs |= other._runs
        self._left_out |= other._left_out

    def only(self, objects: Collection[tuple[int, int]]) -> ClickMeter:
        """The measured ones among these objects."""
        part = ClickMeter(self.max_clicks)
        part._runs = {one: run for one, run in self._runs.items() if one in objects}
        return part

    def _check_new(self, objects: Iterable[tuple[int, int]]) -> None:
        for image_id, object_id in objects:
            if (image_id, object_id) in self._runs or (image_id, object_id) in self._left_out:
                raise ValueError(f"expected every object once, got {object_id} of image {image_id} again")

    @property
    def objects(self) -> list[tuple[int, int]]:
        """(image id, object id) of each measured object, in the order of all `N`."""
        return sorted(self._runs)

    @property
    def runs(self) -> list[ObjectRun]:
        return [self._runs[one] for one in self.objects]

    @property
    def image_ids(self) -> list[int]:
        """The images with a measured object, in the order of all `I`."""
        return sorted({image_id for image_id, _ in self._runs})

    @property
    def num_left_out(self) -> int:
        """Objects that were too small."""
        return len(self._left_out)

    def ious(self) -> np.ndarray:
        """IoU (N, K + 1) before the first click and after each."""
        return np.array([run.ious for run in self.runs]).reshape(-1, self.max_clicks + 1)

    def num_clicks(self, percent: int) -> np.ndarray:
        """For each object (N,) the first number of clicks with this IoU, `max_clicks` if there is none."""
        reached_NK = self._reached(percent)
        return np.where(reached_NK.any(axis=1), reached_NK.argmax(axis=1), self.max_clicks)

    def has_failed(self, percent: int) -> np.ndarray:
        """For each object (N,) whether it never reached this IoU."""
        return np.asarray(~self._reached(percent).any(axis=1))

    def _reached(self, percent: int) -> np.ndarray:
        return self.ious() >= percent / 100

    def metrics(self) -> Metrics:
        """All measures of image weights (I,), for the bootstrap; None without an object that has them."""
        position = {image_id: row for row, image_id in enumerate(self.image_ids)}
        image_N = np.array([position[image_id] for image_id, _ in self.objects], dtype=int)
        ious_NK = self.ious()
        means = {f"noc_{percent}": self.num_clicks(percent).astype(float) for percent in THRESHOLDS}
        means |= {f"mean_iou_{k}": ious_NK[:, k] for k in REPORTED_CLICKS if k <= self.max_clicks}
        means["oracle_iou_1"] = np.array([run.oracle_iou for run in self.runs])
        means["score_error_1"] = np.array([run.score_error for run in self.runs])
        sums = {f"nof_{percent}": self.has_failed(percent) for percent in THRESHOLDS}

        def measure(image_weights_I: np.ndarray) -> dict[str, float | None]:
            weights_N = image_weights_I[image_N]
            found = {name: _weighted_mean(values_N, weights_N) for name, values_N in means.items()}
            return found | {name: float(values_N @ weights_N) for name, values_N in sums.items()}

        return measure

    def values(self) -> dict[str, float | None]:
        """Each measure over all objects."""
        return dict(self.metrics()(np.ones(len(self.image_ids), dtype=int)))

    def intervals(self, *, num_resamples: int = 1000, seed: int = 0) -> dict[str, ValueInterval]:
        """Each measure with its interval over images."""
        return bootstrap_values(self.metrics(), len(self.image_ids), num_resamples=num_resamples, seed=seed)


def clicks_saved(
    without: ClickMeter, seeded: ClickMeter, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """How many clicks an object takes less (NoC) if the user starts from what was found, by `noc_80` and so on.

    Raises:
        ValueError: As `click_differences`.
    """
    names = tuple(f"noc_{percent}" for percent in THRESHOLDS)
    return click_differences(seeded, without, names, num_resamples=num_resamples, seed=seed)


def click_differences(
    first: ClickMeter, second: ClickMeter, names: Collection[str], *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """These measures of the second minus those of the first, with intervals over images.

    Raises:
        ValueError: The two measured different objects, or allowed different numbers of clicks.
    """
    if first.objects != second.objects or first.max_clicks != second.max_clicks:
        raise ValueError("expected two runs of the same objects with as many clicks: measure both on the same split")

    def chosen(meter: ClickMeter) -> Metrics:
        metrics = meter.metrics()
        return lambda weights_I: {name: value for name, value in metrics(weights_I).items() if name in names}

    return bootstrap_differences(
        chosen(first), chosen(second), len(first.image_ids), num_resamples=num_resamples, seed=seed
    )


def _weighted_mean(values_N: np.ndarray, weights_N: np.ndarray) -> float | None:
    """The mean of the values that are numbers."""
    known_N = ~np.isnan(values_N)
    total = weights_N[known_N].sum()
    return float(values_N[known_N] @ weights_N[known_N] / total) if total else None
