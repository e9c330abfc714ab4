"""Processes that import ahead: as many as were asked for, found by the actors they are for, and never needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray.experimental import internal_kv

from sam3lora.processes_ahead import is_ahead, start_ahead


def test_as_many_processes_are_ahead_as_were_started(monkeypatch):
    stored: dict[str, bytes] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_put", stored.__setitem__)
    monkeypatch.setattr(internal_kv, "_internal_kv_list", lambda prefix: [k for k in stored if k.startswith(prefix)])
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda key: int(stored.pop(key, None) is not None))
    start_ahead("package.module.first", {}, count=2, made_by_actor=True)
    start_ahead("package.module.second", {}, count=1, made_by_actor=True)
    # A third process calls the function because it inherits the variables of the second.
    assert [is_ahead("package.module.first") for _ in range(3)] == [True, True, False]
    assert [is_ahead("package.module.second") for _ in range(2)] == [True, False]


def test_where_nothing_can_be_started_the_caller_goes_on():
    start_ahead("package.module.function", {}, count=1, made_by_actor=False)  # no Ray runs


ACTORS = """
import json, ray
from sam3lora.cluster import ray_session
from sam3lora.processes_ahead import calls, start_ahead

class Told:
    def told(self):
        import antechamber
        return antechamber.TOLD

    def of_task(self):
        return ray.get(ray.remote(num_cpus=0)(lambda: __import__("antechamber").TOLD).remote())

class Maker:
    def make(self):
        environment = {"env_vars": calls("antechamber.second")}
        self.made = ray.remote(num_cpus=0, runtime_env=environment)(Told).remote()
        return ray.get([self.made.told.remote(), self.made.of_task.remote()])

with ray_session(None, num_cpus=1, workers_ahead=False):
    start_ahead("antechamber.first", {}, count=1, made_by_actor=False)
    start_ahead("antechamber.second", {"OF": "maker"}, count=1, made_by_actor=True)
    first = ray.remote(num_cpus=0, runtime_env={"env_vars": calls("antechamber.first")})(Told).remote()
    maker = ray.remote(num_cpus=0, runtime_env={"env_vars": {"OF": "maker"}})(Maker).remote()
    print(json.dumps([ray.get(first.told.remote()), *ray.get(maker.make.remote())]))
"""

ANTECHAMBER = """
from sam3lora.processes_ahead import is_ahead
TOLD = []

def first():
    TOLD.append(is_ahead("antechamber.first"))

def second():
    TOLD.append(is_ahead("antechamber.second"))
"""


@pytest.mark.slow
def test_actors_get_the_processes_and_their_tasks_are_not_taken_for_such(tmp_path, monkeypatch):
    (tmp_path / "antechamber.py").write_text(ANTECHAMBER)
    (tmp_path / "actors.py").write_text(ACTORS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    words = [sys.executable, "actors.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == [[True], [True], [False]], done.stderr
