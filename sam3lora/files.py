"""Writing a file or a folder whole: a reader, or a run after a crash, sees all of the new content or none of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from sam3lora.errors import UserError
from sam3lora.local_paths import refuse_bad_path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, larger than a file may be
_OLD = re.compile(r"\..+\.[0-9a-f]{32}\.old")  # what `_name_of_old` makes
_LEFTOVER = re.compile(r"\.(.+\.)?[0-9a-f]{32}\.(part(\..+)?|tmp|old)")


def cache_folder(named: str | None = None) -> Path:
    """The folder that is named, else the environment's SAM3LORA_CACHE, else ~/.cache/sam3lora; it need not exist."""
    if named is None:
        refuse_bad_path(os.environ.get("SAM3LORA_CACHE", ""), "SAM3LORA_CACHE")
    return Path(named or os.environ.get("SAM3LORA_CACHE") or "~/.cache/sam3lora").expanduser().absolute()


def file_name_of(label: str, fallback: str) -> str:
    """A label as a name for a file: letters, digits, spaces, `-`, `_` and `.` stay; `fallback` if nothing does.

    >>> file_name_of("a/b: c", "model")
    'a_b_ c'
    """
    return "".join(letter if letter.isalnum() or letter in "-_. " else "_" for letter in label).strip(" .") or fallback


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file beside `path`, force it to the disk, and rename it to `path`.

    Text is written as UTF-8; what stands in it for bytes of a file's name that are none becomes an escape, as in JSON.

    Raises:
        OSError: It cannot be written; what was at `path` is still there.
    """
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A scratch path beside `path` for whatever writes the file; it takes the place of `path` when the block ends well.

    The scratch path keeps the suffix, from which some writers choose a format.
    """
    path = Path(path)
    scratch = path.with_name(f".{uuid.uuid4().hex}.part{path.suffix}")
    try:
        with errors_of(path, scratch):
            yield scratch
            _sync(scratch)
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """An empty scratch folder beside `target`; it takes the place of `target` when the block ends well.

    Raises:
        OSError: It cannot be written; what was at `target` is still there.
    """
    target = Path(target)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with errors_of(target, scratch):
            scratch.mkdir(parents=True)
            yield scratch
            for path in (*scratch.rglob("*"), scratch):
                _sync(path)
            replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target` on the same file system; an existing `target` is replaced and deleted.

    Linux swaps the two in one step. Where that is not available the old folder is moved away first: `target` is then
    absent for an instant, but never half-written.
    """
    if not target.exists():
        os.rename(source, target)
        return
    old = _name_of_old(target)
    if _exchange(source, target):
        os.rename(source, old)
    else:
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(old, target)
            raise
    _delete_old(target.parent)


def discard_folder(folder: Path) -> None:
    """Remove a folder; it is gone for readers at once, even where some of its files cannot be deleted yet.

    NFS keeps a deleted file that a process of this host still reads under a name like `.nfs0123`, so that its folder
    cannot be deleted either. Such a folder stays beside the others under a hidden name; the next call deletes it.
    """
    os.rename(folder, _name_of_old(folder))
    _delete_old(folder.parent)


def _name_of_old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")


def _delete_old(parent: Path) -> None:
    for path in parent.iterdir():
        if _OLD.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def errors_of(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Name `path` in what the system refuses while the block writes it, or the `scratch` that will take its place.

    Python names a file only where it cannot be opened. safetensors' own exception becomes an OSError.

    Raises:
        OSError: With `errno`, `strerror` and `filename`.
    """
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or (scratch is not None and str(scratch) in str(error.filename))
        if error.errno is None or not unnamed:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if type(error).__name__ != "SafetensorError" or not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def is_full(error: OSError) -> bool:
    """Whether writing failed because there is no more space: on the disk, in the quota, or for one file."""
    return error.errno in _FULL


def check_folder(folder: Path) -> None:
    """Try out in an existing folder what writing whole needs: to create, force to the disk, rename and replace.

    Raises:
        UserError: The file system, such as the mount of an object store, cannot do one of them.
    """
    probe = scratch_folder(folder)
    try:
        for _ in range(2):  # the second replaces the first
            with whole_folder(probe) as scratch:
                write_whole(scratch / "file", "")
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(
            f"cannot write results to {folder} ({error.strerror}): expected a file system that can rename folders and "
            "force files to the disk (fsync), which the mount of an object store often cannot. Give another folder"
        ) from error
    finally:
        remove(probe)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def remove_leftovers(*folders: Path) -> None:
    """Remove the half-written files and folders of killed processes from these folders.

    Their names are hidden and hold 32 random digits, so nothing that a user has put there is taken for one.
    """
    for folder in folders:
        for path in folder.glob(".*"):
            if _LEFTOVER.fullmatch(path.name):
                remove(path)


def scratch_folder(parent: Path) -> Path:
    """A name, not yet taken, for a folder that `remove_leftovers` removes if its process is killed."""
    return parent / f".{uuid.uuid4().hex}.part"


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
