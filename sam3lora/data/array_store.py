"""Arrays that are made once and kept on disk, shared by the processes of a host and by later runs.

    <root>/ab/cdef....npy    an array by its key           <root>/locks/abc.lock    who is making it
    <root>/runs/TIME-...     a run by when it opened the store; the file's time is that of its last use

A file is written under another name and renamed, so a reader sees a whole array or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

RECENT_S = 3600.0  # what a run has used is safe from others until it has not used the store for so long
LONGEST_WAIT_S = 300.0  # for another process to make an array; then the waiting one makes it itself
_DISK_KEPT_FREE = (0.05, 2 * 10**9)  # the smaller of a share of the disk and bytes
_HEADER_BYTES = 128
_TEMPORARY_IS_OLD_S = 3600.0
_SECONDS_BETWEEN_SIGNS = 60.0


class ArrayStore:
    """A folder of arrays with a bound on its size. Travels to other processes, which then count as the same run.

    Where the bound or the free disk is reached, the arrays go that no run has used for longest, but none that was used
    since this run opened the store, nor since any run did that was using it in the hour (`RECENT_S`) before. Runs read
    all their images in turn: of a store that drops the least recently read they would find nothing again, but so every
    epoch and every trial of a sweep finds what fits. An hour after the last run with other images, theirs make room.
    When nothing may go, nothing more is added.

    Args:
        root: The folder; made if need be.
        limit_bytes: Most bytes of all arrays. Of processes that write at the same time each may exceed it by 5 %.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._opened_ns = time.time_ns()
        self._run = root / "runs" / f"{self._opened_ns}-{uuid.uuid4().hex}"
        self._start()
        for name in ("locks", "runs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._sign()
        self._kept_since_ns = self._first_recent_run_ns()

    def _start(self) -> None:
        self.is_full = False
        self._signed_s = 0.0
        self._touched: set[str] = set()
        self._content: _Content | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("root", "limit_bytes", "_opened_ns", "_run", "_kept_since_ns")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __contains__(self, key: str) -> bool:
        """Whether there is a file; only `get` finds out whether it can be read."""
        return self._touch(key)

    def get(self, key: str) -> np.ndarray | None:
        """The array; None if there is none, or its file is damaged."""
        if not self._touch(key):
            return None
        file = self._file(key)
        try:
            return np.load(file, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            logger.warning("cache: %s is damaged (%s) and is made anew", file, error)
            self.remove(key)
            return None

    def put(self, key: str, array: np.ndarray) -> bool:
        """Keep an array, in place of one with the same key; False if there is no room."""
        self._sign_now_and_then()
        if self.is_full:
            return False
        file = self._file(key)
        scratch = file.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            if not self._make_room(array.nbytes + _HEADER_BYTES):
                self._stop(f"{self.limit_bytes / 1e9:.3g} GB or the disk are filled by what is in use")
                return False
            file.parent.mkdir(exist_ok=True)
            try:
                with scratch.open("wb") as stream:
                    np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)
                _set_time(scratch, time.time_ns())
                os.replace(scratch, file)
            finally:
                scratch.unlink(missing_ok=True)
        except OSError as error:
            self._stop(str(error))
            return False
        self._touched.add(key)
        return True

    def remove(self, key: str) -> None:
        self._touched.discard(key)
        with contextlib.suppress(OSError):
            self._file(key).unlink()

    @contextlib.contextmanager
    def claim(self, key: str, *, wait: bool = False) -> Iterator[bool]:
        """Hold the right to make an array, until the block ends or the process dies.

        Args:
            key: Of the array. Keys may share a lock.
            wait: Until another process gives the right up. Hold no other claim meanwhile.

        Yields:
            Whether it was got. Look for the array then: who had the right before may have made it.
        """
        lock = FileLock(self.root / "locks" / f"{key[:3]}.lock")
        try:
            lock.acquire(timeout=LONGEST_WAIT_S if wait else 0)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError):  # a file system without locks: everyone makes what is missing
            yield True
            return
        try:
            yield True
        finally:
            lock.release()

    def _file(self, key: str) -> Path:
        return self.root / key[:2] / f"{key[2:]}.npy"

    def _touch(self, key: str) -> bool:
        """Whether the file is there; it counts as used by this run from now on."""
        self._sign_now_and_then()
        file = self._file(key)
        try:
            if key not in self._touched and file.stat().st_mtime_ns < self._opened_ns:
                _set_time(file, time.time_ns())
            elif key in self._touched and not file.exists():
                return False
        except FileNotFoundError:
            return False
        except OSError:  # somebody else's file, which can be read all the same
            return file.exists()
        self._touched.add(key)
        return True

    def _first_recent_run_ns(self) -> int:
        """When the first of the runs opened the store that have used it of late; this one is among them."""
        began = [self._opened_ns]
        for run in self._run.parent.iterdir():
            with contextlib.suppress(OSError, ValueError):
                if run.stat().st_mtime < time.time() - RECENT_S:
                    run.unlink()
                else:
                    began.append(int(run.name.partition("-")[0]))
        return min(began)

    def _sign(self) -> None:
        """Say that this run uses the store."""
        self._signed_s = time.time()
        self._run.touch()
        _set_time(self._run, time.time_ns())

    def _sign_now_and_then(self) -> None:
        if abs(time.time() - self._signed_s) > _SECONDS_BETWEEN_SIGNS:
            with contextlib.suppress(OSError):
                self._sign()

    def _stop(self, reason: str) -> None:
        self.is_full = True
        logger.warning("cache: %s: nothing more is added to %s", reason, self.root)

    def _make_room(self, num_bytes: int) -> bool:
        """Whether an array of this size fits, after removing what may go."""
        content = self._content
        if content is None or content.added > self.limit_bytes / 20:
            content = self._content = self._scan()
        while not self._fits(content.used + num_bytes, num_bytes):
            if not content.removable:
                return False
            old = content.removable.pop()
            with contextlib.suppress(OSError):
                if old.file.stat().st_mtime_ns >= self._kept_since_ns:
                    continue  # touched since
                old.file.unlink()
            content.used -= old.num_bytes
        content.used, content.added = content.used + num_bytes, content.added + num_bytes
        return True

    def _fits(self, used: int, num_bytes: int) -> bool:
        disk = shutil.disk_usage(self.root)
        kept_free = min(_DISK_KEPT_FREE[0] * disk.total, _DISK_KEPT_FREE[1])
        return used <= self.limit_bytes and disk.free - num_bytes >= kept_free

    def _scan(self) -> _Content:
        content = _Content(0, [], 0)
        for file in self.root.glob("??/*"):
            with contextlib.suppress(OSError):
                found = file.stat()
                if file.suffix == ".tmp" and found.st_mtime < time.time() - _TEMPORARY_IS_OLD_S:
                    file.unlink()  # its writer was killed
                    continue
                content.used += found.st_size
                if file.suffix == ".npy" and found.st_mtime_ns < self._kept_since_ns:
                    content.removable.append(_Entry(found.st_mtime_ns, found.st_size, file))
        content.removable.sort(reverse=True)
        return content


class _Entry(NamedTuple):
    modified_ns: int
    num_bytes: int
    file: Path


class _Content:
    """What a store held when it was last counted; ``removable`` has the oldest last."""

    def __init__(self, used: int, removable: list[_Entry], added: int) -> None:
        self.used, self.removable, self.added = used, removable, added


def digest(*parts: Any) -> str:
    """A key (64 hexadecimal digits) for JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def image_digest(store: ArrayStore, path: str) -> str:
    """SHA-256 of an image file's bytes; a file whose size and time are known is not read again.

    Raises:
        OSError: The file cannot be read.
    """
    found = os.stat(path)
    key = digest("image file", os.path.abspath(path), found.st_size, found.st_mtime_ns)
    kept = store.get(key)
    if kept is not None and kept.dtype == np.uint8 and kept.shape == (32,):
        return kept.tobytes().hex()
    with open(path, "rb") as stream:
        value = hashlib.file_digest(stream, "sha256")
    store.put(key, np.frombuffer(value.digest(), dtype=np.uint8))
    return value.hexdigest()


def _set_time(file: Path, time_ns: int) -> None:
    os.utime(file, ns=(time_ns, time_ns))
