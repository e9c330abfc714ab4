"""Bootstrap intervals of a metric and of the difference between two models: how much the choice of images matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sam3lora.evaluation.metrics.average_precision import average_precision, category_detections
from sam3lora.evaluation.metrics.matching import MASKS, MatchTable

# weights on images (I,), whole numbers that sum to I -> value, None where it cannot be computed
Metric = Callable[[np.ndarray], float | None]
# the same for several metrics by name
Metrics = Callable[[np.ndarray], Mapping[str, float | None]]


@dataclass(frozen=True)
class Interval:
    """The difference B minus A and its interval; None where they cannot be computed.

    Attributes:
        low, high: Ends of the interval; None also with fewer than two images.
        excludes_zero: Whether both ends lie on one side of zero.
        num_resamples: Number of resamples on which both models could be measured.
    """

    difference: float | None
    low: float | None
    high: float | None
    excludes_zero: bool
    num_resamples: int


@dataclass(frozen=True)
class ValueInterval:
    """A metric of one model and its interval; None where they cannot be computed.

    Attributes:
        low, high: Ends of the interval; None also with fewer than two images.
        num_resamples: Number of resamples on which the model could be measured.
    """

    value: float | None
    low: float | None
    high: float | None
    num_resamples: int


def bootstrap_difference(
    metric_a: Metric,
    metric_b: Metric,
    num_images: int,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Paired percentile bootstrap over images of `metric_b - metric_a`.

    As many images as there are are drawn with replacement, and both models are measured on the same draw, so that the
    difficulty of an image cancels out. The interval holds the middle `confidence` of the differences.
    Efron (1979), "Bootstrap methods: another look at the jackknife", https://doi.org/10.1214/aos/1176344552

    The interval shows how much the difference depends on the choice of images, if they are independent draws.
    Neighbouring frames of a video, crops and augmented copies are not independent, and make it too narrow. It does not
    cover another training seed, other kinds of images or wrong annotations. With few images (some tens) it is rough and
    mostly too narrow.

    Args:
        metric_a: Image weights (I,) -> value of model A, None where it cannot be computed (such draws are left out).
        metric_b: The same for model B.
        seed: The same seed gives the same draws and the same interval.
        confidence: Share of the draws inside the interval, in (0, 1).

    Raises:
        ValueError: `confidence` or `num_resamples` is out of range.
    """

    found = bootstrap_differences(
        lambda image_weights_I: {"": metric_a(image_weights_I)},
        lambda image_weights_I: {"": metric_b(image_weights_I)},
        num_images,
        num_resamples=num_resamples,
        seed=seed,
        confidence=confidence,
    )
    return found[""]


def bootstrap_differences(
    metrics_a: Metrics,
    metrics_b: Metrics,
    num_images: int,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """`bootstrap_difference` of the metrics that both models have, by name, on the same draws."""

    def differences(image_weights_I: np.ndarray) -> dict[str, float | None]:
        values_a, values_b = metrics_a(image_weights_I), metrics_b(image_weights_I)
        return {name: _difference(value, values_b[name]) for name, value in values_a.items() if name in values_b}

    found = bootstrap_values(differences, num_images, num_resamples=num_resamples, seed=seed, confidence=confidence)
    return {
        name: Interval(one.value, one.low, one.high, _excludes_zero(one.low, one.high), one.num_resamples)
        for name, one in found.items()
    }


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _excludes_zero(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and (low > 0 or high < 0)


def bootstrap_value(
    metric: Metric, num_images: int, *, num_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> ValueInterval:
    """Percentile bootstrap over images of one model's metric; arguments and errors as in `bootstrap_difference`."""
    found = bootstrap_values(
        lambda image_weights_I: {"": metric(image_weights_I)},
        num_images,
        num_resamples=num_resamples,
        seed=seed,
        confidence=confidence,
    )
    return found[""]


def bootstrap_values(
    metrics: Metrics, num_images: int, *, num_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, ValueInterval]:
    """`bootstrap_value` of several metrics by name, on the same draws."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be positive, got {num_resamples}")
    observed = metrics(np.ones(num_images, dtype=int))
    if num_images < 2 or all(value is None for value in observed.values()):
        return {name: ValueInterval(value, None, None, 0) for name, value in observed.items()}
    rng = np.random.default_rng(seed)
    shares_I = np.full(num_images, 1 / num_images)
    drawn = [metrics(rng.multinomial(num_images, shares_I)) for _ in range(num_resamples)]
    return {
        name: _interval(value, [one[name] for one in drawn], confidence)
        if value is not None
        else ValueInterval(None, None, None, 0)
        for name, value in observed.items()
    }


def _interval(observed: float, drawn: Sequence[float | None], confidence: float) -> ValueInterval:
    values = [value for value in drawn if value is not None]
    if not values:
        return ValueInterval(observed, None, None, 0)
    tail = (1 - confidence) / 2
    low, high = (float(value) for value in np.quantile(values, [tail, 1 - tail]))
    return ValueInterval(observed, low, high, len(values))


def map_difference(
    table_a: MatchTable,
    table_b: MatchTable,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """`bootstrap_difference` of the mAP of two models, from their matches with the same ground truth.

    Raises:
        ValueError: The matches differ in images, categories or objects.
    """
    num_objects_IC = table_a.num_objects_KIC[MASKS]
    if not np.array_equal(num_objects_IC, table_b.num_objects_KIC[MASKS]):
        raise ValueError(
            "expected two evaluations of one ground truth, got different images, categories or objects: "
            "evaluate both models on the same split and categories"
        )
    detections_a, detections_b = category_detections(table_a), category_detections(table_b)
    return bootstrap_difference(
        lambda image_weights_I: average_precision(detections_a, image_weights_I),
        lambda image_weights_I: average_precision(detections_b, image_weights_I),
        len(num_objects_IC),
        num_resamples=num_resamples,
        seed=seed,
        confidence=confidence,
    )
