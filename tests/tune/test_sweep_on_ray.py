"""Sweeps in real processes: trials that fail or are stopped, a killed driver, more trials later."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import ray.cloudpickle

from sam3lora.errors import RunFailed, UserError
from sam3lora.tune.run.ledger import Ledger
from sam3lora.tune.run.sweep import run_sweep
from sam3lora.tune.space.reader import load_space

from . import faults

pytestmark = pytest.mark.slow

SPACE = {
    "name": "small",
    "base": "quick_test",
    "set": {"training.max_steps": None, "training.num_epochs": 2, "scaling.num_workers": 0, "lora.rank": 2},
    "parameters": {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}},
    "search": {"metric": "valid_loss", "num_trials": 4, "max_concurrent": 2},
    "early_stopping": {"scheduler": "none"},
}


@pytest.fixture(scope="module")
def faulty_ray():
    """A Ray whose processes have the faults; with CPUs for one trial with a worker beside another one."""
    ray.cloudpickle.register_pickle_by_value(faults)
    ray.init(
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300_000_000,
        runtime_env={"worker_process_setup_hook": faults.install},
    )
    yield
    ray.shutdown()


def space(data_dir, **changes):
    return load_space(SPACE | changes, overrides=[f"training.data_dir={data_dir}"])


def seeds(*numbers, workers=0):
    """A grid over seeds: each chooses a fault."""
    return {
        "parameters": {"training.seed": {"grid": list(numbers)}},
        "set": SPACE["set"] | {"scaling.num_workers": workers, "scaling.max_failures": 0, "training.num_epochs": 1},
        "search": {"algorithm": "grid", "metric": "valid_loss", "max_concurrent": 2},
    }


def test_trials_that_fail_say_why_and_the_others_go_on(faulty_ray, data_dir, tmp_path):
    numbers = (faults.EXCEPTION, faults.NOT_FINITE, faults.KILLED, faults.OUT_OF_MEMORY_ONCE, faults.OUT_OF_MEMORY)
    result = run_sweep(space(data_dir, **seeds(*numbers)), tmp_path / "sweep")
    by_seed = {record.values["training.seed"]: record for record in result.records}
    assert by_seed.keys() == {42, *numbers}
    failures = {seed: (record.status, record.failure) for seed, record in by_seed.items()}
    assert failures == {
        42: ("finished", None),
        faults.EXCEPTION: ("failed", "exception"),
        faults.NOT_FINITE: ("failed", "loss not finite"),
        faults.KILLED: ("failed", "process lost"),
        faults.OUT_OF_MEMORY_ONCE: ("finished", None),
        faults.OUT_OF_MEMORY: ("failed", "out of memory"),
    }
    assert "a fault made for a test" in by_seed[faults.EXCEPTION].reason
    assert "not finite at step 1" in by_seed[faults.NOT_FINITE].reason
    [retry] = by_seed[faults.OUT_OF_MEMORY_ONCE].retries
    assert (retry["batch_size"], retry["gradient_accumulation_steps"]) == (1, 2)
    assert len(by_seed[faults.OUT_OF_MEMORY].retries) == 1
    assert result.best.number in (0, by_seed[faults.OUT_OF_MEMORY_ONCE].number)
    page = result.report.read_text()
    assert "a fault made for a test" in page
    assert "process lost" in page


def test_a_lost_worker_fails_its_trial_only(faulty_ray, data_dir, tmp_path):
    result = run_sweep(space(data_dir, **seeds(faults.KILLED, faults.EXCEPTION, workers=1)), tmp_path / "sweep")
    by_seed = {record.values["training.seed"]: record for record in result.records}
    assert by_seed[42].status == "finished"
    assert (by_seed[faults.KILLED].status, by_seed[faults.KILLED].failure) == ("failed", "worker lost")
    assert (by_seed[faults.EXCEPTION].status, by_seed[faults.EXCEPTION].failure) == ("failed", "exception")
    assert not list((tmp_path / "sweep").rglob(".*.part"))


def test_trials_that_are_given_up_make_room_for_the_next(faulty_ray, data_dir, tmp_path):
    """All CPUs go to one trial's worker: those of a stopped trial must be free again."""
    changes = {
        "set": SPACE["set"]
        | {"scaling.num_workers": 1, "scaling.resources_per_worker": {"CPU": 6}, "training.num_epochs": 3},
        "parameters": {"training.learning_rate": {"grid": [1e-9, 2e-9, 3e-9]}},
        "search": {"algorithm": "grid", "metric": "valid_loss"},
        "early_stopping": {"grace_epochs": 1, "reduction_factor": 2},
    }
    result = run_sweep(space(data_dir, **changes), tmp_path / "sweep")
    found = {record.number: (record.status, record.epochs) for record in result.records}
    assert found.pop(0) == ("finished", 3)
    assert {status for status, _ in found.values()} == {"stopped"}
    assert max(epochs for _, epochs in found.values()) < 3  # its worker may be through with the next one
    assert all((tmp_path / "sweep" / "trials" / f"{n:04d}" / "best").is_dir() for n in range(4))


def test_resources_that_no_host_has_are_named_at_once(faulty_ray, data_dir, tmp_path):
    for workers in (0, 1):
        wanted = SPACE["set"] | {"scaling.num_workers": workers, "scaling.resources_per_worker": {"accelerator": 1}}
        with pytest.raises(UserError, match="accelerator"):
            run_sweep(space(data_dir, set=wanted), tmp_path / f"sweep_{workers}")


def test_a_sweep_of_failures_ends_with_their_reason_and_a_report(faulty_ray, data_dir, tmp_path):
    changes = seeds(faults.EXCEPTION)
    changes["search"] |= {"include_base": False}
    with pytest.raises(RunFailed, match="a fault made for a test"):
        run_sweep(space(data_dir, **changes), tmp_path / "sweep")
    assert "a fault made for a test" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert not (tmp_path / "sweep" / "best").exists()


def test_a_killed_driver_leaves_a_sweep_that_goes_on(data_dir, tmp_path):
    """Ended trials keep their numbers, no trial is done twice, and there are as many as were asked for."""
    space_file, sweep_dir = tmp_path / "small.yaml", tmp_path / "sweep"
    space_file.write_text(json.dumps(SPACE))
    command = [sys.executable, "-m", "sam3lora", "tune", str(space_file), "--data-dir", str(data_dir)]
    command += ["--output-dir", str(sweep_dir), "--max-concurrent", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ledger = Ledger(sweep_dir)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
        _wait(lambda: _ended(ledger) >= 1 and len(ledger.records()) > _ended(ledger), driver)
        trials = {pid for pid in _descendants(driver.pid) if "ImplicitFunc" in _command(pid)}
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _wait_until_gone(trials)  # Ray's own agents take their time
    before = {record.number: record for record in ledger.records() if record.has_ended}
    folders = {number: _state(ledger.folder(number)) for number in before}
    assert 1 <= len(before) < 4

    assert subprocess.run([*command, "--resume"], env=environment, check=False).returncode == 0
    after = {record.number: record for record in ledger.records()}
    assert sorted(after) == [0, 1, 2, 3]
    assert {record.status for record in after.values()} == {"finished"}
    assert {number: after[number] for number in before} == before
    assert {number: _state(ledger.folder(number)) for number in before} == folders
    assert [len(record.history) for record in after.values()] == [2] * 4
    fresh = run_sweep(space(data_dir), tmp_path / "fresh")  # what an undisturbed sweep measures
    assert [record.values for record in fresh.records] == [after[number].values for number in range(4)]
    assert [record.value for record in fresh.records] == pytest.approx(
        [after[number].value for number in range(4)], rel=1e-6
    )


def test_a_sweep_that_is_over_takes_more_trials_and_computes_frozen_features_once(faulty_ray, data_dir, tmp_path):
    """Trials that start together share images; training, validation loss and metrics all read their features."""
    frozen = {
        "training.cache_dir": str(tmp_path / "cache"),
        "training.feature_cache": True,
        "lora.apply_to_vision_encoder": False,
    }
    targets = {"lora.target_modules": {"choice": {"none": ["no_such_layer"], "some": ["q_proj", "v_proj"]}}}
    search = {"metric": "map", "num_trials": 2, "max_concurrent": 2}
    changes = {"set": SPACE["set"] | frozen, "parameters": SPACE["parameters"] | targets}
    first = run_sweep(space(data_dir, search=search, **changes), tmp_path / "sweep")
    result = run_sweep(space(data_dir, search=search | {"num_trials": 3}, **changes), tmp_path / "sweep", resume=True)
    assert [(record.number, record.status) for record in result.records] == [(n, "finished") for n in range(3)]
    assert result.records[:2] == first.records
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["sessions"]) == 2
    passes = [record.vision_passes for record in result.records]
    assert sum(passes) == result.summary["vision"]["images"] == 6
    looks = 2 * (4 + 2) + 2 * 2  # two epochs of training and validation, and metrics
    assert [record.vision_passes + record.features_loaded for record in result.records] == [looks] * 3
    rejections = Ledger(tmp_path / "sweep").rejections()
    assert {rejection.kind for rejection in rejections} <= {"impossible settings"}  # they cost no trial


def _ended(ledger):
    return sum(record.has_ended for record in ledger.records())


def _state(folder: Path):
    """What a trial leaves; its checkpoints go when the sweep ends."""
    kept = [folder / "trial.json", folder / "metrics.jsonl", *(folder / "best").iterdir()]
    return {path.relative_to(folder): path.read_bytes() for path in kept}


def _wait(condition, driver, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, driver.stderr.read().decode()
        assert time.monotonic() < deadline, "the driver did not get there in time"
        time.sleep(0.1)


def _descendants(pid: int) -> set[int]:
    """Processes that a process started, and those that they started: a local Ray and its workers."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def _command(pid: int) -> str:
    """The command line of a process; Ray names those that run something "ray::..."."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _wait_until_gone(pids: set[int], seconds=60):
    assert pids
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"processes {left} of the killed sweep are still there"
        time.sleep(0.1)
