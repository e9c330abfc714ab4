"""The benchmarks of data and of several workers: both ways do the same work. Times decide nothing here."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from jobs.bench import data, data_wait, scaling
from jobs.bench.collectives import _split, time_collectives
from jobs.bench.cost_model import FITTED, Setting, StepCost, compare_prediction
from jobs.bench.data import ANNOTATIONS, DataWork, agreement, compare_data, make_ours, make_plain, write_photographs
from jobs.bench.data_wait import WaitWork, compare_waiting, make_trainer
from jobs.bench.plain_data import plain_loader
from jobs.bench.processes import Measured
from jobs.bench.scaling import ALONE, APART, TOGETHER, ScalingWork, compare_scaling
from sam3lora.errors import UserError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of three objects; read only."""
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, DataWork(64, num_images=5, num_objects=3))
    return folder


def in_this_process(ways, *, rounds, num_threads):
    """As `measure_in_turns`, without processes."""
    found = {}
    for name, work in ways.items():
        run = work.make(**work.arguments)
        results = tuple(run() for _ in range(rounds))
        found[name] = Measured((0.5,) * rounds, None, None, results)
    return found


@pytest.mark.parametrize("resolution", [56, 336, 1008])
def test_both_ways_read_the_same(photographs, resolution):
    # Shrinking, and enlarging at 1008. Masks are drawn in a window here and in the whole frame there, so that a
    # coordinate near the middle between two pixels may round differently.
    found = agreement(photographs, DataWork(resolution, num_images=4))
    assert found["same queries and targets"]
    assert found["largest difference of pixels, of 255"] == 0
    assert found["largest difference of boxes"] < 1e-6
    assert found["mask pixels that differ"] < 1e-5


def test_the_plain_loader_gives_what_it_promises(photographs):
    loader = plain_loader(photographs, ANNOTATIONS, resolution=56, mask_size=28, batch_size=2, num_workers=0)
    first, *_, last = list(loader)
    assert (len(first["images"]), len(last["images"])) == (2, 1)
    assert first["masks"].dtype == torch.bool
    assert first["masks"].shape == (6, 28, 28)
    assert first["masks"].flatten(1).any(1).all()
    assert len(first["prompts"]) == len(first["num_targets"]) == len(first["query_image"])
    assert int(first["num_targets"].sum()) == len(first["boxes"]) == 6


def test_a_round_reads_everything(photographs):
    work = DataWork(56, num_images=5)
    ours, plain = make_ours(photographs, work, use_ray=False)(), make_plain(photographs, work, num_workers=0)()
    for result in (ours, plain):
        assert result.keys() == {"cpu_s", "first_batch_s", "digest"}
        assert result["cpu_s"] >= 0
    assert ours["digest"] == make_ours(photographs, work, use_ray=False)()["digest"]


def test_the_comparison_tells_rates_and_agreement(monkeypatch):
    monkeypatch.setattr(data, "measure_in_turns", in_this_process)
    monkeypatch.setattr(data, "make_plain", lambda folder, work, num_workers: make_plain(folder, work, 0))
    [found] = compare_data([56], num_images=5, rounds=1, use_ray=False)
    assert [way.name for way in found.ways] == [data.OURS, data.PLAIN, data.PLAIN_WORKER]
    assert found.facts[f"images/s, {data.OURS}"] == 10.0
    assert found.facts["DataLoaders give the same bytes"] is True
    assert found.facts["same queries and targets"] is True
    console = Console(width=150, file=io.StringIO())
    found.print(console)
    assert "pixels and masks of 56 x 56" in console.file.getvalue()


@pytest.mark.slow
def test_the_trainer_has_the_same_batches_whoever_makes_them(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        write_photographs(tmp_path / split, DataWork(224, num_images=3, num_objects=2))
    work = WaitWork("tiny", num_steps=2)
    ahead, needed = (make_trainer(str(tmp_path), work, ahead=ahead)() for ahead in (True, False))
    assert ahead["losses"] == needed["losses"]
    assert len(ahead["losses"]) == 2
    assert 0 <= ahead["waited"] <= 1


@pytest.mark.slow
def test_collective_calls_are_timed_among_processes():
    found = time_collectives(2, 4000, repeats=1)
    assert found.keys() == {"counts", "gradients"}
    assert all(seconds > 0 for seconds in found.values())
    assert _split(10, 3) == [4, 4, 2]


def test_what_the_figures_of_workers_mean(monkeypatch):
    # 2 s a step together, 1.8 s apart, 1 s alone; 0.2 s of calls
    seconds = {TOGETHER: 4.0, APART: 3.6, ALONE: 2.0}

    def measured(ways, *, rounds, num_threads):
        assert num_threads == 1
        results = {TOGETHER: [1.0, 1.0], APART: [1.0, 2.0], ALONE: [1.0]}
        return {
            name: Measured(
                (seconds[name],), None, None, ([{"gradient_bytes": 2e6, "weights": w} for w in results[name]],)
            )
            for name in ways
        }

    monkeypatch.setattr(scaling, "measure_in_turns", measured)
    monkeypatch.setattr(scaling, "time_collectives", lambda count, size: {"counts": 0.0, "gradients": 0.2})
    found = compare_scaling(ScalingWork("light", "tiny", num_steps=2), rounds=1, simulated=(2, 16))
    assert [way.seconds for way in found.ways] == [2.0, 1.8, 1.0]
    facts = found.facts
    assert facts["images/s, 2 workers"] == 1.0
    assert facts["2 workers / 2 processes on their own"] == 0.9
    assert facts["2 workers hold the same weights"] is True
    assert facts["2 processes on their own hold the same weights"] is False
    assert facts["predicted: 16 workers / as many processes on their own"] == 0.9


@pytest.mark.slow
def test_two_workers_step_alike_and_two_processes_do_not():
    found = compare_scaling(ScalingWork("light", "tiny", num_prompts=2, num_steps=1), rounds=1, simulated=(2,))
    assert found.facts["2 workers hold the same weights"] is True
    assert found.facts["2 processes on their own hold the same weights"] is False
    assert found.facts["gradients, MB"] > 0


@pytest.mark.slow
def test_data_in_processes_of_their_own():
    [found] = compare_data([56], num_images=5, rounds=1)
    assert found.facts["in process and Ray Data give the same bytes"] is True
    assert found.facts["DataLoaders give the same bytes"] is True
    assert found.facts["largest difference of pixels, of 255"] == 0


@pytest.mark.slow
def test_waiting_in_processes_of_their_own():
    found = compare_waiting(WaitWork("tiny", num_steps=2), rounds=1)
    assert found.facts["the same losses"] is True
    assert [way.name for way in found.ways] == [data_wait.AHEAD, data_wait.NEEDED]


def test_the_cost_model_finds_what_the_steps_were_made_of():
    cost = StepCost(fixed=0.5, vision=2.0, detector=0.25)
    found = StepCost.fit({setting: cost(setting) for setting in FITTED})
    assert found.fixed == pytest.approx(0.5)
    assert found(Setting(2, 4)) == pytest.approx(0.5 + 2 * (2.0 + 4 * 0.25))
    with pytest.raises(ValueError, match="must differ in images and prompts, got "):
        StepCost.fit({Setting(1, 1): 1.0, Setting(2, 1): 2.0})


@pytest.mark.slow
def test_predictions_stand_beside_measurements():
    found = compare_prediction("light", model="tiny", rounds=1, tried=[Setting(1, 2)])
    assert [way.name for way in found.ways] == ["1 x 1 (fitted)", "1 x 4 (fitted)", "2 x 2 (fitted)", "1 x 2"]
    assert "predicted / measured, 1 x 2" in found.facts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataWork(336, num_images=0), "num_images must be positive, got 0"),
        (lambda: DataWork(7), "at least one patch of 14 pixels, got 7"),
        (lambda: compare_data(rounds=0), "rounds must be positive, got 0"),
        (lambda: compare_prediction(rounds=0), "rounds must be positive, got 0"),
        (lambda: WaitWork(num_steps=0), "num_steps must be positive, got 0"),
        (lambda: compare_waiting(rounds=0), "rounds must be positive, got 0"),
        (lambda: ScalingWork(num_steps=0), "num_steps must be positive, got 0"),
        (lambda: compare_scaling(simulated=(1,)), r"workers at least 2, got 3 and \[1\]"),
    ],
)
def test_impossible_work(make, message):
    with pytest.raises(UserError, match=message):
        make()
