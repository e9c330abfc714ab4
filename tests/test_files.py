"""Writing whole where a file system refuses something: what stays, and what is told."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sam3lora import files
from sam3lora.errors import UserError


def write(folder: Path, text: str) -> None:
    with files.whole_folder(folder) as scratch:
        (scratch / "file").write_text(text)


@pytest.fixture
def open_files(monkeypatch):
    """NFS for a process that reads a file: deleting renames it to `.nfs...`, and its folder cannot be deleted.

    The returned set holds the contents of the files that are being read.
    """
    being_read: set[str] = set()
    real = shutil.rmtree

    def rmtree(folder, ignore_errors=False, **options):
        for path in [path for path in Path(folder).rglob("*") if path.is_file()]:
            if path.read_text() in being_read:
                path.rename(path.with_name(f".nfs{path.stat().st_ino:016x}"))
                if not ignore_errors:
                    raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
                return
        real(folder, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return being_read


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_that_is_being_read_is_replaced(tmp_path, monkeypatch, open_files, swaps):
    # With and without a swap in one step: the new content is there, and the old goes when nobody reads it any more.
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target = tmp_path / "best"
    write(target, "1")
    open_files.add("1")
    write(target, "2")
    assert (target / "file").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 2
    open_files.clear()
    write(target, "3")
    assert (target / "file").read_text() == "3"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_being_read_is_discarded(tmp_path, open_files):
    # Its name is gone at once; the next discarded folder takes the leftover along, and nothing else that is hidden.
    for name in ("step_1", "step_2", ".vimrc.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    open_files.add("step_1")
    files.discard_folder(tmp_path / "step_1")
    assert not (tmp_path / "step_1").exists()
    assert len(list(tmp_path.iterdir())) == 3
    open_files.clear()
    files.discard_folder(tmp_path / "step_2")
    assert [path.name for path in tmp_path.iterdir()] == [".vimrc.old"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_names_what_was_written(tmp_path):
    # Python names no file when writing fails, and safetensors has an exception of its own.
    target = tmp_path / "best"
    write(target, "1")

    def fill() -> None:
        with files.whole_folder(target) as scratch:
            (scratch / "weights").symlink_to("/dev/full")
            (scratch / "weights").write_text("2")

    with pytest.raises(OSError, match="No space") as caught:
        fill()
    assert files.is_full(caught.value)
    assert caught.value.filename == str(target)
    assert (target / "file").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


def test_the_exception_of_safetensors(tmp_path):
    # A folder that does not exist stands for whatever the system refuses.
    with pytest.raises(FileNotFoundError) as caught, files.errors_of(tmp_path / "best"):
        save_file({"a": torch.zeros(1)}, tmp_path / "absent" / "file")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "best"))


def test_another_file_keeps_its_name(tmp_path):
    # What was read while a folder is written is not the folder.
    with pytest.raises(FileNotFoundError) as caught, files.whole_folder(tmp_path / "best"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")


def test_a_file_system_that_can_all_of_it(tmp_path):
    files.check_folder(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("function", "number"), [("rename", errno.EXDEV), ("fsync", errno.EINVAL)])
def test_a_file_system_that_cannot(tmp_path, monkeypatch, function, number):
    # Mounts of object stores rename no folders; others do not force files to the disk.
    real = getattr(os, function)

    def refuse(path, *arguments):
        if function == "fsync" or Path(path).is_dir():
            raise OSError(number, os.strerror(number))
        return real(path, *arguments)

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(UserError, match=os.strerror(number)) as caught:
        files.check_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_only_names_with_random_digits_are_taken_for_leftovers(tmp_path):
    digits = "0123456789abcdef" * 2
    ours = [
        f".{digits}.part.json",
        f".{digits}.part",
        f".best.{digits}.old",
        f".cracks.{digits}.part",
        f".{digits}.tmp",
    ]
    theirs = [".bashrc.old", ".notes.tmp", ".song.part1", ".photos.old", ".ray", f"{digits}.part", f".{digits}"]
    for name in ours + theirs:
        (tmp_path / name).mkdir()
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


def test_names_of_files_that_are_no_text_are_written_as_json_has_them(tmp_path):
    values = {"file_name": "ö\udcff.png"}  # as Python reads the bytes of a name
    files.write_whole(tmp_path / "a.json", json.dumps(values, ensure_ascii=False))
    assert (tmp_path / "a.json").read_text("utf-8") == '{"file_name": "ö\\udcff.png"}'
    assert json.loads((tmp_path / "a.json").read_bytes()) == values
