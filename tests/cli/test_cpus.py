"""The cores that a process may use."""

from __future__ import annotations

import os

import pytest

from sam3lora import cpus


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("6400000 100000", 8), ("", 8), (None, 8)],
)
def test_the_quota_of_a_container_bounds_the_cores(quota, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "CGROUP_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cpus.usable_cpus() == expected
