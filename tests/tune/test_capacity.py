"""How many trials run at a time."""

import pytest

from sam3lora.config import load_config
from sam3lora.tune.run.capacity import local_concurrency, local_cpus, trial_needs, trials_that_fit


def config(**scaling):
    return load_config({"model": {"name": "tiny"}, "lora": {"apply_to_detr_decoder": True}, "scaling": scaling})


@pytest.mark.parametrize(
    ("nodes", "needs", "fit"),
    [
        ([], [{"CPU": 1.0}], 0),
        ([{"CPU": 2.0}], [{"CPU": 1.0}], 2),
        ([{"CPU": 2.0}], [{"CPU": 3.0}], 0),
        ([{"CPU": 2.0}, {"CPU": 1.0}], [{"CPU": 1.5}], 1),  # the halves that are left lie on different nodes
        ([{"CPU": 4.0}], [{"CPU": 1.0}, {"CPU": 1.0}], 2),  # two workers a trial
        ([{"CPU": 3.0}], [{"CPU": 1.0}, {"CPU": 1.0}], 1),  # half a trial would wait without end
        ([{"CPU": 8.0, "GPU": 1.0}], [{"CPU": 2.0, "GPU": 0.5}], 2),  # a GPU shared by two trials
        ([{"CPU": 8.0, "GPU": 1.0}], [{"CPU": 2.0, "GPU": 0.3}], 3),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}], [{"CPU": 1.0, "GPU": 1.0}], 1),  # only one node has a GPU
        ([{"CPU": 2.0}], [{"CPU": 0.1}], 20),  # tenths add up in spite of rounding
    ],
)
def test_trials_that_fit_counts_whole_trials(nodes, needs, fit):
    assert trials_that_fit(nodes, needs) == fit


@pytest.mark.parametrize(("strategy", "fit"), [("PACK", 2), ("SPREAD", 2), ("STRICT_PACK", 1), ("STRICT_SPREAD", 1)])
def test_strict_placement_leaves_less_room(strategy, fit):
    nodes = [{"CPU": 3.0}, {"CPU": 1.0}]
    assert trials_that_fit(nodes, [{"CPU": 1.0}, {"CPU": 1.0}], strategy) == fit


def test_a_trial_needs_its_workers_and_their_data_tasks_or_one_process():
    assert trial_needs(config(num_workers=2), use_gpu=False) == [{"CPU": 3.0}] * 2
    assert trial_needs(config(num_workers=[1, 3], resources_per_worker={"CPU": 1}), use_gpu=False) == [{"CPU": 1.0}] * 3
    shared = config(num_workers=1, resources_per_worker={"GPU": 0.5})
    assert trial_needs(shared, use_gpu=True) == [{"CPU": 3.0, "GPU": 0.5}]
    # Without Ray Train.
    assert trial_needs(config(num_workers=0), use_gpu=False) == [{"CPU": 1.0}]
    assert trial_needs(config(num_workers=0), use_gpu=True) == [{"CPU": 1.0, "GPU": 1.0}]


def test_a_local_ray_gets_the_cpus_that_its_trials_ask_for():
    asked = config(num_workers=1, resources_per_worker={"CPU": 3})
    assert local_concurrency(asked, 2).trials == 2
    assert local_cpus(asked, 2) == 6
    too_large = config(num_workers=1, resources_per_worker={"CPU": 4096})
    assert local_concurrency(too_large, None).trials == 1  # one by one
