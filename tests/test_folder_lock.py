"""One process at a time writes into a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sam3lora.errors import UserError
from sam3lora.folder_lock import locked_folder

REPOSITORY = Path(__file__).resolve().parents[1]
HOLD = """
import sys
from pathlib import Path
from sam3lora.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    """A process that holds the lock of a folder until its input ends."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": REPOSITORY}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **options)
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_second_process_is_told_of_the_first_until_it_is_killed(tmp_path):
    folder = tmp_path / "new" / "run"
    with hold(folder) as holder:
        for _ in range(2):  # a refused start leaves the lock as it was
            with (
                pytest.raises(UserError, match=rf"{folder} \(process {holder.pid} on host {socket.gethostname()}\)"),
                locked_folder(folder, "training"),
            ):
                pass
        holder.kill()
    with locked_folder(folder, "training"):  # although the file of the killed process is still there
        assert json.loads((folder / ".lock").read_text())["process"] == os.getpid()
    assert not list(folder.iterdir())


def test_a_lock_file_that_its_holder_removed_locks_nobody(tmp_path, monkeypatch):
    # Between our opening the file and locking it, the holder ended and a third process took the lock anew: both of us
    # would hold "the" lock, on two files.
    file = tmp_path / ".lock"
    file.touch()
    original, others = fcntl.flock, []

    def flock(descriptor, how):
        if not others:
            file.unlink()
            others.append(file.open("w"))
            original(others[0], how)
        original(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process"), locked_folder(tmp_path, "training"):
        pass
    others[0].close()


def test_file_system_without_locks(tmp_path, monkeypatch, caplog):
    # The work goes on, with a word.
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_folder(tmp_path, "training"):
        (tmp_path / "result").touch()
    assert f"{tmp_path} has no file locks (No locks available)" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_link_in_the_place_of_the_lock_keeps_its_target(tmp_path):
    (tmp_path / "important").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "important")
    with pytest.raises(UserError, match="symbolic"), locked_folder(tmp_path / "run", "training"):
        pass
    assert (tmp_path / "important").read_text() == "mine"
