"""A local Ray asks for a token, and leaves none in the home folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sam3lora import local_ray

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_without_any_it_gets_one_for_the_process():
    first, second = local_ray._token_of_local_ray(), local_ray._token_of_local_ray()
    assert first == second
    assert len(first["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x")]
)
def test_what_the_user_has_set_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert local_ray._token_of_local_ray() == {}


def test_the_users_own_token_stays(home):
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("own")
    assert local_ray._token_of_local_ray() == {}


SESSIONS = """
import os, subprocess, sys, ray
from sam3lora.cluster import ray_session
from sam3lora.local_ray import _own_token

JOIN = "import ray, sys; ray.init(address=sys.argv[1]); print('joined')"

def joins(token):
    address = ray.get_runtime_context().gcs_address
    # by the loopback interface, on which it listens
    environment = {**os.environ, "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    words = [sys.executable, "-c", JOIN, address]
    return "joined" in subprocess.run(words, env=environment, capture_output=True, text=True).stdout

with ray_session(None, num_cpus=1):
    print(ray.get(ray.remote(lambda: 7).remote()))
with ray_session(None, num_cpus=1):
    print(ray.get(ray.remote(lambda: 7).remote()), joins(_own_token()), joins("0" * 64))
"""


@pytest.mark.slow
def test_it_lets_nobody_in_without_its_token_and_leaves_none(home):
    words = [sys.executable, "-c", SESSIONS]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["7", "7", "True", "False"], done.stderr
    assert not (home / ".ray" / "auth_token").exists()
