"""Where samples come from: the same again after a restart, and better ones from Optuna."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter

import pytest

from sam3lora.errors import UserError
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.search.proposals import build_sampler
from sam3lora.tune.search.samplers import GridCycle

MIXED = {
    "training.learning_rate": {"loguniform": [1e-5, 1e-1]},
    "lora.rank": {"choice": [4, 8, 16]},
    "lora.alpha": {"tied": "2 * lora.rank"},
    "training.warmup_steps": {"randint": [0, 9]},
    "lora.target_modules": {"choice": {"few": ["q_proj"], "many": ["q_proj", "v_proj"]}},
    "training.seed": {"grid": [1, 2]},
    "lora.use_rslora": {"grid": [True, False]},
}


def proposals(sampler, numbers, attempt=0):
    return {number: sampler.propose(number, attempt) for number in numbers}


def test_a_random_trial_depends_on_its_number_alone(space_of):
    space = space_of(MIXED)
    all_at_once = proposals(build_sampler(space), range(1, 9))
    for values in all_at_once.values():
        assert list(values) == list(space.parameters)
        assert values["lora.alpha"] == 2 * values["lora.rank"]
        space.config_of(values)
    resumed = build_sampler(space)
    resumed.observe(TrialRecord(1, all_at_once[1], status="finished", value=0.5))
    resumed.reject(2)
    assert proposals(resumed, [7, 3, 5]) == {number: all_at_once[number] for number in (7, 3, 5)}
    assert len({str(values) for values in all_at_once.values()}) == 8
    assert resumed.propose(3, 1) != resumed.propose(3, 0)
    assert proposals(build_sampler(space_of(MIXED, search={"seed": 1})), [3]) != proposals(resumed, [3])


def test_grid_parameters_are_visited_evenly_by_random_and_optuna(space_of):
    for algorithm in ("random", "optuna"):
        sampler = build_sampler(space_of(MIXED, search={"algorithm": algorithm}))
        seen = proposals(sampler, range(1, 11)).values()
        counts = Counter((values["training.seed"], values["lora.use_rslora"]) for values in seen)
        assert sorted(counts.values()) == [2, 2, 3, 3]


def test_a_grid_is_gone_through_once_in_the_order_of_the_file(space_of):
    parameters = {
        "lora.rank": {"choice": [4, 8]},
        "lora.alpha": {"tied": "lora.rank"},
        "training.seed": {"grid": [1, 2, 3]},
    }
    sampler = build_sampler(space_of(parameters, search={"algorithm": "grid"}))
    found = [sampler.propose(number, 0) for number in range(7)]
    assert [tuple(values.values()) for values in found[:6]] == [
        (rank, rank, seed) for rank, seed in itertools.product([4, 8], [1, 2, 3])
    ]
    assert found[6] is None


def test_the_cycle_has_every_combination_once(space_of):
    values = {"lora.rank": [1, 2, 3], "training.seed": [5, 6], "lora.use_dora": [True, False]}
    cycle = GridCycle(space_of({key: {"grid": list_} for key, list_ in values.items()}))
    points = [tuple(cycle.point(number, 0)[key] for key in values) for number in range(1, 25)]
    assert sorted(points[:12]) == sorted(itertools.product(*values.values()))
    assert points[:12] != sorted(points[:12])
    assert points[12:] == points[:12]


def test_a_cycle_of_millions_of_combinations_is_not_listed(space_of):
    keys = ("lora.rank", "lora.alpha", "training.seed", "training.warmup_steps")
    cycle = GridCycle(space_of({key: {"grid": list(range(1, 60))} for key in keys}))
    points = [tuple(cycle.point(number, 0)[key] for key in keys) for number in range(1, 1001)]
    assert len(set(points)) == 1000
    assert all({point[place] for point in points} == set(range(1, 60)) for place in range(4))


def quality(values) -> float:
    """Best at a learning rate of 1e-3 and rank 16."""
    return -abs(math.log10(values["training.learning_rate"]) + 3) - (values["lora.rank"] != 16)


def mean_quality(records) -> float:
    return sum(quality(record.values) for record in records) / len(records)


def searched(space, trials=40, *, first=1, known=(), ending=lambda number: "finished"):
    sampler, records = build_sampler(space, known), list(known)
    for number in range(first, first + trials):
        values = sampler.propose(number, 0)
        status = ending(number)
        history = [{"epoch": epoch, "map": quality(values) - 1 / epoch} for epoch in (1, 2)]
        value = None if status == "failed" else quality(values)
        records.append(TrialRecord(number, values, status=status, value=value, history=history))
        sampler.observe(records[-1])
    return sampler, records


def test_optuna_comes_closer_than_chance(space_of):
    # The 20 last samples of each: TPE has learned where it is good, random has not.
    means = {}
    for algorithm in ("random", "optuna"):
        _, records = searched(space_of(MIXED, search={"algorithm": algorithm}))
        means[algorithm] = mean_quality(records[20:])
    assert means["optuna"] > means["random"] + 0.4


def test_a_study_is_rebuilt_from_the_ledger(space_of):
    space = space_of(MIXED, search={"algorithm": "optuna"})
    endings = {2: "stopped", 3: "failed"}
    outside = TrialRecord(0, space.base_values() | {"lora.rank": 5}, is_base=True, status="finished", value=0.1)
    _, records = searched(space, 15, known=[outside], ending=lambda number: endings.get(number, "finished"))
    sampler, more = searched(space, 15, first=16, known=records)
    states = [trial.state.name for trial in sampler._study.trials]
    assert Counter(states[:16]) == {"COMPLETE": 14, "PRUNED": 1, "FAIL": 1}
    assert sampler._study.trials[2].intermediate_values == {
        1: records[2].history[0]["map"],
        2: records[2].value - 1 / 2,
    }
    # What it learned before counts: it goes on near the optimum at once.
    assert mean_quality(more[16:]) > mean_quality(records[1:6])
    assert searched(space, 5, first=16, known=records)[1][16:] == searched(space, 5, first=16, known=records)[1][16:]


def test_rejected_samples_are_failures_for_optuna_and_random_ones_follow(space_of):
    sampler = build_sampler(space_of(MIXED, search={"algorithm": "optuna"}))
    random = build_sampler(space_of(MIXED))
    for attempt in range(25):
        values = sampler.propose(1, attempt)
        sampler.reject(1)
    assert {trial.state.name for trial in sampler._study.trials} == {"FAIL"}
    assert values == random.propose(1, 24)


def test_quality_and_size_looks_for_small_adapters_too(space_of):
    search = {"algorithm": "optuna", "objective": "quality_and_size"}
    space = space_of({"lora.rank": {"randint": [1, 64]}}, search=search)
    sampler = build_sampler(space)
    for number in range(1, 31):
        values = sampler.propose(number, 0)
        status = "stopped" if number % 5 == 0 else "finished"  # a stopped one counts with its value
        sampler.observe(
            TrialRecord(number, values, status=status, value=0.5, trainable_parameters=1000 * values["lora.rank"])
        )
    assert {trial.state.name for trial in sampler._study.trials} == {"COMPLETE"}
    assert sampler._study.directions[0].name == "MAXIMIZE"
    late = [sampler.propose(number, 0)["lora.rank"] for number in range(31, 41)]
    assert sum(late) / 10 < 25  # the quality is always the same, so small is better


def test_optuna_that_is_missing_says_how_to_get_it(space_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'sam3lora\[tune\]', or choose random"):
        build_sampler(space_of(MIXED, search={"algorithm": "optuna"}))
