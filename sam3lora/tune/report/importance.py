"""How much each parameter of a sweep mattered, with a test against chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.stats

from sam3lora.tune.run.ledger import TrialRecord, has_value
from sam3lora.tune.space.expressions import is_number
from sam3lora.tune.space.parameters import FreeParameter

FEWEST_TRIALS = 6
MOST_LEVELS = 4  # of a numeric parameter; with more, its trials are divided into thirds
LARGE_GROUP = 5  # from here the chi-squared distribution is a good approximation
SIGNIFICANT = 0.05
_PERMUTATIONS = 9999

Effect = Literal["clear", "maybe", "not told apart from chance"]


@dataclass(frozen=True)
class Level:
    """The trials that share a value of a parameter, or lie in the same third of its values."""

    label: str  # the value, or the ends of the third
    num_trials: int
    median: float  # of the metric


@dataclass(frozen=True)
class Importance:
    """How much one parameter mattered.

    Attributes:
        epsilon_squared: Share of the variation of the values' ranks that goes with the parameter, in [0, 1]; None with
            a `reason`.
        chance: What it would be on average if the parameter did not matter.
        p_value: Probability that chance alone gives as much or more.
        effect: In words; None with a `reason`.
        levels: The groups that were compared, in the order of the values.
        reason: Why the importance is not known.
    """

    parameter: str
    epsilon_squared: float | None = None
    chance: float | None = None
    p_value: float | None = None
    effect: Effect | None = None
    levels: tuple[Level, ...] = ()
    reason: str | None = None


def importances(records: Sequence[TrialRecord], parameters: Sequence[FreeParameter]) -> list[Importance]:
    """The importance of each parameter, by falling epsilon-squared; unknown ones come last.

    The trials are grouped by the parameter's value: a numeric parameter of more than four values by thirds. The test
    of Kruskal and Wallis (1952) asks whether the ranks of the trials' values differ between the groups; the effect
    size is epsilon-squared = H / (n - 1) for n trials and k groups (Tomczak and Tomczak, "The need to report effect
    size estimates revisited", Trends in Sport Sciences 1(21), 2014), with H corrected for ties. Without any effect its
    mean is (k - 1) / (n - 1). The p-value is that of scipy's chi-squared approximation, or of permutations of the
    values where a group has fewer than five trials.

    "Clear" is a p-value of at most 0.05 after Bonferroni's correction for the number of parameters, "maybe" one of at
    most 0.05 before it. Ranks give the same result for losses and for scores, and limit the weight of a diverged trial.
    Each parameter is tested alone, so interactions are not seen. A sampler that learns from trials draws more where
    results are good: its trials are not independent and the p-values only a hint.

    Trials that were stopped early count with the value that they had; failed ones do not count.
    """
    measured = [record for record in records if has_value(record)]
    found = [_importance(measured, parameter, len(parameters)) for parameter in parameters]
    return sorted(found, key=lambda entry: 1.0 if entry.epsilon_squared is None else -entry.epsilon_squared)


def _importance(records: Sequence[TrialRecord], parameter: FreeParameter, num_parameters: int) -> Importance:
    name = parameter.key
    records = [record for record in records if name in record.values]
    if len(records) < FEWEST_TRIALS:
        return Importance(
            name, reason=f"{len(records)} trials with a value are too few: {FEWEST_TRIALS} are needed at least"
        )
    settings = [record.values[name] for record in records]
    values = np.array([record.value for record in records], dtype=float)
    groups, labels = _groups(settings, parameter)
    if len(labels) < 2:
        return Importance(name, reason="the trials do not differ in it")
    if np.ptp(values) == 0:
        return Importance(name, reason="all trials have the same value")
    members = [values[groups == number] for number in range(len(labels))]
    levels = tuple(Level(text, len(own), float(np.median(own))) for text, own in zip(labels, members, strict=True))
    test = scipy.stats.kruskal(*members)
    few = min(map(len, members)) < LARGE_GROUP
    p_value = _permutation_p_value(scipy.stats.rankdata(values), groups) if few else float(test.pvalue)
    effect: Effect = "not told apart from chance"
    if p_value <= SIGNIFICANT:
        effect = "clear" if p_value * num_parameters <= SIGNIFICANT else "maybe"
    degrees = len(values) - 1
    return Importance(
        name, float(test.statistic) / degrees, (len(labels) - 1) / degrees, p_value, effect, levels=levels
    )


def _groups(settings: Sequence[Any], parameter: FreeParameter) -> tuple[np.ndarray, list[str]]:
    """The group of each trial, (n,) from 0, and the groups' labels."""
    label = parameter.label
    numeric = parameter.is_numeric and all(is_number(value) for value in settings)
    keys = [float(value) if numeric else json.dumps(value, sort_keys=True, default=str) for value in settings]
    distinct = sorted(set(keys)) if numeric else list(dict.fromkeys(keys))
    if not numeric or len(distinct) <= MOST_LEVELS:
        return (
            np.array([distinct.index(key) for key in keys]),
            [label(settings[keys.index(key)]) for key in distinct],
        )
    numbers = np.array(keys, dtype=float)
    thirds = np.searchsorted(np.quantile(numbers, [1 / 3, 2 / 3]), numbers)
    _, groups = np.unique(thirds, return_inverse=True)  # many equal values can leave a third empty
    labels = []
    for group in range(groups.max() + 1):
        own = sorted((value for value, its in zip(settings, groups, strict=True) if its == group), key=float)
        labels.append(label(own[0]) if own[0] == own[-1] else f"{label(own[0])} to {label(own[-1])}")
    return groups, labels


def _permutation_p_value(ranks: np.ndarray, groups: np.ndarray) -> float:
    """Share of the orders of the ranks, (n,), in which the groups, (n,), differ as much: all orders, or a sample."""
    weights = np.equal.outer(np.unique(groups), groups).astype(float)  # (k, n)
    sizes = weights.sum(axis=1)

    def spread(shuffled: np.ndarray, axis: int = -1) -> np.ndarray:
        """The part of H that depends on the order; it rises with H."""
        sums = np.moveaxis(shuffled, axis, -1) @ weights.T
        return np.round((sums**2 / sizes).sum(axis=-1), 9)

    test = scipy.stats.permutation_test(
        (ranks,), spread, permutation_type="pairings", vectorized=True, alternative="greater",
        n_resamples=_PERMUTATIONS, random_state=0,
    )  # fmt: skip
    return float(test.pvalue)
