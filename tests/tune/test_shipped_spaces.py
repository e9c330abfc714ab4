"""Every search space that comes with the package can be tried whole, on its own base and on the tiny model."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from sam3lora.tune.search.proposals import Proposer
from sam3lora.tune.space.reader import load_space, space_names

NAMES = ("components", "demo", "learning_rate", "lora_full", "lora_quick", "negatives")


def test_the_names():
    assert tuple(space_names()) == NAMES


@pytest.mark.parametrize("base", [None, "quick_test", "demo"])
@pytest.mark.parametrize("name", NAMES)
def test_all_trials_can_be_proposed(name, base):
    space = load_space(name, config=base)
    proposer = Proposer(space, taken=[])
    proposals = [proposer.next(number) for number in range(space.num_trials)]
    assert None not in proposals
    assert proposals[0].is_base
    assert proposals[0].config == space.base
    assert len({proposal.config.to_yaml() for proposal in proposals}) == space.num_trials
    limit = space.constraints.parameter_limit or float("inf")
    assert all(0 < proposal.trainable_parameters <= limit for proposal in proposals)
    for proposal in proposals:
        assert space.trial_config(proposal.values, "trials/0000").lora == proposal.config.lora


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_how_to_run_it_and_what_it_costs(name):
    text = resources.files("tune_spaces").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    folder = "outputs/shapes" if name == "demo" else "DIR"
    assert f"#   sam3lora tune {name} --data-dir {folder}" in comment
    assert name == "demo" or f"sam3lora tune {name} --data-dir DIR --config quick_test" in comment
    said = re.search(r"Cost: (\d+) trials(?:, each| of (?:the base's|\d+) epochs at most)", comment)
    assert int(said[1]) == load_space(name).num_trials


def test_lora_full_can_be_searched_by_optuna():
    space = load_space("lora_full", config="quick_test", algorithm="optuna", num_trials=4)
    proposer = Proposer(space, taken=[])
    assert len([proposer.next(number) for number in range(4)]) == 4
