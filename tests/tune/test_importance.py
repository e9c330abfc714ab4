"""How much parameters mattered: known statistics, no claims without evidence."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import scipy.stats

from sam3lora.tune.report.importance import importances
from sam3lora.tune.space.parameters import parse_parameter

from .made_sweeps import trial

RANK = parse_parameter("lora.rank", {"choice": [4, 8]})
DROPOUT = parse_parameter("lora.dropout", {"uniform": [0.0, 1.0]})
MODULES = parse_parameter("lora.target_modules", {"choice": {"few": ["q_proj"], "many": ["q_proj", "fc1"]}})


def one(records, parameter):
    (found,) = importances(records, [parameter])
    assert found.parameter == parameter.key
    return found


def ranks_4_and_8(low, high):
    values = [(4, value) for value in low] + [(8, value) for value in high]
    return [trial(number, value, lora__rank=rank) for number, (rank, value) in enumerate(values)]


def test_parted_by_the_parameter_alone():
    # Ranks 1..3 and 4..6: H = 12 / (6 * 7) * (6^2 / 3 + 15^2 / 3) - 3 * 7 = 27 / 7, and epsilon-squared is H / 5.
    found = one(ranks_4_and_8([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), RANK)
    assert found.epsilon_squared == pytest.approx(27 / 35)
    assert found.chance == pytest.approx(1 / 5)
    # Of the 20 ways to choose who has rank 4, two part the values like this.
    assert found.p_value == pytest.approx(2 / 20)
    assert found.effect == "not told apart from chance"
    assert [(level.label, level.num_trials, level.median) for level in found.levels] == [("4", 3, 0.2), ("8", 3, 0.5)]


def test_no_difference_and_many_trials():
    found = one(ranks_4_and_8([0.1, 0.4, 0.5], [0.2, 0.3, 0.6]), RANK)
    assert found.epsilon_squared == pytest.approx(1 / 105)
    assert found.effect == "not told apart from chance"
    low, high = [0.01 * n for n in range(7)], [0.035 + 0.01 * n for n in range(7)]
    found = one(ranks_4_and_8(low, high), RANK)
    assert found.p_value == pytest.approx(scipy.stats.kruskal(low, high).pvalue)


@pytest.mark.parametrize(("num_parameters", "effect"), [(1, "clear"), (4, "maybe")])
def test_clear_is_judged_by_how_many_were_looked_at(num_parameters, effect):
    records = ranks_4_and_8([0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8])  # p = 2 / 70
    for record in records:
        record.values["lora.dropout"] = (3 * record.number % 8) / 10
    found = importances(records, [RANK] + [DROPOUT] * (num_parameters - 1))
    assert found[0].parameter == "lora.rank"
    assert found[0].effect == effect


def test_levels_are_thirds_of_numbers_and_labels_of_lists():
    records = [trial(number, number / 10, lora__dropout=number / 100) for number in range(12)]
    found = one(records, DROPOUT)
    assert [level.num_trials for level in found.levels] == [4, 4, 4]
    assert found.levels[0].label == "0 to 0.03"
    assert found.effect == "clear"
    records = [trial(number, number / 10, lora__dropout=max(0.0, (number - 7) / 100)) for number in range(12)]
    levels = one(records, DROPOUT).levels  # a third that is one value
    assert [(level.label, level.num_trials) for level in levels] == [("0", 8), ("0.01 to 0.04", 4)]
    records = [trial(n, n / 10, lora__target_modules=[["q_proj"], ["q_proj", "fc1"]][n % 2]) for n in range(8)]
    assert [level.label for level in one(records, MODULES).levels] == ["few", "many"]


def test_the_direction_of_the_metric_a_diverged_trial_and_an_early_stop_do_not_matter():
    records = ranks_4_and_8([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    losses = [replace(record, value=-1.0 * record.value, status="stopped") for record in records]
    losses[0].value = 1e9
    assert one(losses, RANK).epsilon_squared == one(records, RANK).epsilon_squared


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (ranks_4_and_8([0.1, 0.2], [0.3, 0.4, 0.5]), "5 trials with a value are too few"),
        (ranks_4_and_8([0.1, 0.2, 0.3], [None, None, 0.4]), "4 trials with a value are too few"),
        ([replace(r, status="failed") for r in ranks_4_and_8([0.1] * 4, [0.2] * 4)], "0 trials"),
        (ranks_4_and_8([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], []), "do not differ"),
        (ranks_4_and_8([0.1] * 4, [0.1] * 4), "same value"),
    ],
)
def test_too_little_is_said_to_be_so(records, reason):
    found = one(records, RANK)
    assert found.epsilon_squared is None
    assert found.effect is None
    assert reason in found.reason


def test_chance_is_seldom_called_an_effect():
    """Values without any relation to six parameters: a "clear" one in at most about one of twenty sweeps."""
    rng = random.Random(0)
    parameters = [parse_parameter(f"training.p{n}", {"choice": [1, 2, 3]}) for n in range(6)]
    alarms = 0
    for _ in range(40):
        records = [
            trial(number, rng.random(), **{f"training__p{n}": rng.choice([1, 2, 3]) for n in range(6)})
            for number in range(15)
        ]
        alarms += any(found.effect == "clear" for found in importances(records, parameters))
    assert alarms <= 6


def test_ordered_by_effect_and_the_unknown_last():
    records = ranks_4_and_8([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    for record in records:
        record.values |= {"lora.dropout": record.number % 2, "lora.target_modules": ["q_proj"]}
    assert [found.parameter for found in importances(records, [MODULES, DROPOUT, RANK])] == [
        "lora.rank", "lora.dropout", "lora.target_modules",
    ]  # fmt: skip
