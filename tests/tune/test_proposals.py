"""Which samples become trials, and why the others do not."""

from __future__ import annotations

import pytest

from sam3lora.config import load_config
from sam3lora.errors import UserError
from sam3lora.tune.estimate.parameter_budget import count_trainable
from sam3lora.tune.run.ledger import TrialRecord
from sam3lora.tune.search.proposals import Proposer


def propose_all(space, **options):
    rejected = []
    proposer = Proposer(space, on_reject=rejected.append, **options)
    found = [proposer.next(number) for number in range(space.num_trials)]
    return [proposal for proposal in found if proposal is not None], rejected


def as_record(proposal, status="finished"):
    return TrialRecord(proposal.number, proposal.values, is_base=proposal.is_base, status=status, value=0.5)


def parameters_at(rank: int) -> int:
    return count_trainable(load_config("quick_test", [f"lora.rank={rank}"]))


def test_the_first_trial_is_the_base_unchanged(space_of):
    space = space_of({"lora.dropout": {"uniform": [0.0, 0.5]}}, search={"num_trials": 4})
    proposals, rejected = propose_all(space)
    assert [proposal.is_base for proposal in proposals] == [True, False, False, False]
    assert proposals[0].config == load_config("quick_test") == space.base
    assert proposals[0].values == {"lora.dropout": 0.0}
    assert [proposal.config.lora.dropout for proposal in proposals] == [p.values["lora.dropout"] for p in proposals]
    assert rejected == []


def test_without_the_base_all_trials_are_samples(space_of):
    proposals, _ = propose_all(space_of(search={"include_base": False}))
    assert sorted(proposal.values["lora.rank"] for proposal in proposals) == [4, 8, 16]
    assert not any(proposal.is_base for proposal in proposals)


def test_samples_over_the_budget_give_way_to_others(space_of):
    limit = parameters_at(20)
    space = space_of(
        {"lora.rank": {"randint": [1, 64]}}, constraints={"max_trainable_parameters": limit}, search={"num_trials": 12}
    )
    proposals, rejected = propose_all(space)
    assert len(proposals) == 12
    assert all(proposal.trainable_parameters == parameters_at(proposal.config.lora.rank) for proposal in proposals)
    assert max(proposal.values["lora.rank"] for proposal in proposals) <= 20
    over = [rejection for rejection in rejected if rejection.kind == "over budget"]
    assert over
    assert min(rejection.values["lora.rank"] for rejection in over) > 20
    assert f"over the bound of {limit:,} trainable parameters" in over[0].reason
    assert over[0].trainable_parameters == parameters_at(over[0].values["lora.rank"])
    # A rejection of an earlier session is not reported again.
    assert propose_all(space, rejected=rejected) == (proposals, [])


def test_impossible_settings_are_rejected_with_the_reason(space_of):
    parameters = {
        "components": {"choice": ["mask decoder", "detr"]},
        "lora.target_modules": {"choice": {"attention": ["q_proj"], "MLP": ["fc1"]}},  # no fc1 in the mask decoder
    }
    proposals, rejected = propose_all(space_of(parameters))
    assert {(proposal.values["components"], *proposal.values["lora.target_modules"]) for proposal in proposals} == {
        ("vision + detr + mask decoder", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),  # the base
        ("mask decoder", "q_proj"),
        ("detr", "q_proj"),
        ("detr", "fc1"),
    }
    (impossible,) = [rejection for rejection in rejected if rejection.kind == "impossible settings"]
    assert impossible.values == {"components": "mask decoder", "lora.target_modules": ["fc1"]}
    assert "'fc1' matches no module in mask_decoder" in impossible.reason


def test_what_a_configuration_refuses_is_rejected_too(space_of):
    parameters = {
        "components": {"choice": ["decoder", "vision"]},
        "lora.vision_last_layers": {"choice": [2, 3]},
    }
    proposals, rejected = propose_all(space_of(parameters))
    assert sorted(p.values["lora.vision_last_layers"] for p in proposals if not p.is_base) == [2, 3]
    assert {rejection.values["components"] for rejection in rejected} == {"decoder"}
    assert "vision_last_layers has no effect" in rejected[0].reason


def test_the_same_configuration_is_tried_once(space_of):
    # Two names for the same modules, and the base has rank 8 already.
    parameters = {"components": {"choice": ["detr", "detr_encoder + detr_decoder"]}, "lora.rank": {"choice": [4, 8]}}
    space = space_of(parameters)
    proposals, rejected = propose_all(space)
    assert len(proposals) == 3  # the base, and detr at two ranks
    assert [rejection.kind for rejection in rejected] == ["already tried"] * 2


def test_a_small_space_ends_and_reports_each_rejection_once(space_of):
    space = space_of({"lora.rank": {"randint": [4, 6]}}, search={"num_trials": 9})
    rejected = []
    proposer = Proposer(space, on_reject=rejected.append)
    found = [proposer.next(number) for number in range(9)]
    assert sorted(proposal.values["lora.rank"] for proposal in found[1:4]) == [4, 5, 6]
    assert found[4:] == [None] * 5
    assert len({rejection.values["lora.rank"] for rejection in rejected}) == len(rejected)


@pytest.mark.parametrize("algorithm", ["random", "grid", "optuna"])
def test_a_resumed_sweep_proposes_what_is_missing(space_of, algorithm):
    parameters = {"lora.rank": {"choice": [2, 4, 8, 16]}, "training.seed": {"choice": [1, 2]}}
    space = space_of(parameters, search={"algorithm": algorithm, "num_trials": 9})
    proposals, _ = propose_all(space)
    assert len(proposals) == 9  # with the base, which has seed 42
    begun = [as_record(proposal) for proposal in proposals[:4]] + [as_record(proposals[6], "running")]
    rejected = []
    proposer = Proposer(space, taken=begun, on_reject=rejected.append)
    rest = [proposer.next(number) for number in (4, 5, 7, 8)]
    every = [record.values for record in begun] + [proposal.values for proposal in rest]
    assert len({str(values) for values in every}) == 9
    assert not any(proposal.is_base for proposal in rest)
    assert algorithm != "grid" or rejected == []


def test_a_space_without_a_possible_sample_is_found_at_the_start(space_of):
    tight = {"max_trainable_parameters": parameters_at(4)}
    no_base = {"include_base": False}
    smallest = f"within 1,000 trainable parameters.*the smallest has {parameters_at(4):,} trainable parameters"
    impossible = {"lora.target_modules": {"choice": [["nothing"]]}}
    for space, words in [
        (space_of(constraints={"max_trainable_parameters": 1000}, search=no_base), smallest),
        (space_of(impossible, search={"algorithm": "grid"}), "none of 1 samples is possible; the first: .*'nothing'"),
        (space_of(constraints=tight), "the base configuration quick_test is over the budget.*include_base: false"),
    ]:
        with pytest.raises(UserError, match=words):
            Proposer(space, taken=[])
    exactly = {"max_adapter_mb": parameters_at(4) * 4 / 1e6}  # four bytes a parameter
    for constraints in (tight, exactly):
        proposals, _ = propose_all(space_of(constraints=constraints, search=no_base))
        assert [proposal.values for proposal in proposals] == [{"lora.rank": 4}]
