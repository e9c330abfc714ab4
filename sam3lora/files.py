"""Writing a file or a folder whole: a reader, or a run after a crash, sees all of the new content or none of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from sam3lora.local_paths import refuse_address

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def cache_folder(named: str | None = None) -> Path:
    """The folder that is named, else the environment's SAM3LORA_CACHE, else ~/.cache/sam3lora; it need not exist."""
    if named is None:
        refuse_address(os.environ.get("SAM3LORA_CACHE", ""), "SAM3LORA_CACHE")
    return Path(named or os.environ.get("SAM3LORA_CACHE") or "~/.cache/sam3lora").expanduser().absolute()


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file beside `path`, force it to the disk, and rename it to `path`. Text is written as UTF-8.

    Raises:
        OSError: It cannot be written; what was at `path` is still there.
    """
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A scratch path beside `path` for whatever writes the file; it takes the place of `path` when the block ends well.

    The scratch path keeps the suffix, from which some writers choose a format.
    """
    path = Path(path)
    scratch = path.with_name(f".{uuid.uuid4().hex}.part{path.suffix}")
    try:
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
    scratch.mkdir(parents=True)
    try:
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
    if _exchange(source, target):
        shutil.rmtree(source)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    os.rename(target, old)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


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
    """Remove the half-written files and folders of killed processes from these folders; they have hidden names."""
    for folder in folders:
        for pattern in (".ray", ".*.part*", ".*.tmp", ".*.old"):
            for leftover in folder.glob(pattern):
                remove(leftover)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
