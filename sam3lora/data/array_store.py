"""A size-limited cache of arrays on disk, shared by the processes of a host and by later runs.

    <root>/ab/cdef....npy    an array; its key is abcdef...
    <root>/locks/abc.lock    held by the process that is making an array whose key begins with abc
    <root>/runs/TIME-...     one file per run: TIME is when the run opened the store, the file's mtime is its last use

An array file is written under another name and renamed, so a reader sees a whole array or none. It is not forced to the
disk: a file that a crash has damaged is found on reading and made again.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

RECENT_S = 3600.0  # a run that has not used the store for this long no longer protects its arrays
LONGEST_WAIT_S = 300.0  # for another process to make an array; after that the waiting process makes it itself
_DISK_KEPT_FREE = (0.05, 2 * 10**9)  # a share of the disk, or bytes if that is less
_HEADER_BYTES = 128
_TEMPORARY_IS_OLD_S = 3600.0
_SECONDS_BETWEEN_SIGNS = 60.0  # of use: the mtime of a run's file


class ArrayStore:
    """A folder of arrays with a limit on its size. It can be pickled; the copies count as the same run.

    Eviction: when the limit or the free disk is reached, the store evicts the least recently used arrays, but never
    those used since an active run opened the store. A run is active until it has not used the store for an hour
    (`RECENT_S`). When no array may be evicted, no more are added.

    Reason: runs read all their images in turn. If the images do not all fit, a plain least-recently-used cache evicts
    each array shortly before it is needed again. With this rule, every epoch and every trial of a sweep finds the
    arrays that fit.

    Args:
        root: The folder; it is created if necessary.
        limit_bytes: Limit for all arrays together. Each of several processes that write at the same time may exceed it
            by 5 %.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._opened_ns = time.time_ns()
        self._run = root / "runs" / f"{self._opened_ns}-{uuid.uuid4().hex}"
        self._reset()
        for name in ("locks", "runs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._mark_run_active()
        self._kept_since_ns = self._first_active_run_ns()

    def _reset(self) -> None:
        """The state of one process, which is not pickled."""
        self.is_full = False
        self._marked_s = 0.0
        self._touched: set[str] = set()
        self._content: _Content | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("root", "limit_bytes", "_opened_ns", "_run", "_kept_since_ns")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __contains__(self, key: str) -> bool:
        """Whether there is a file; `get` may still find it damaged."""
        return self._touch(key)

    def get(self, key: str) -> np.ndarray | None:
        """The array; None if it is missing or its file is damaged."""
        if not self._touch(key):
            return None
        file = self._file(key)
        try:
            return np.load(file, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            logger.warning("cache: %s is damaged (%s) and will be made again", file, error)
            self.remove(key)
            return None

    def put(self, key: str, array: np.ndarray) -> bool:
        """Store an array, replacing one with the same key; False if there is no room."""
        self._mark_run_active_if_due()
        if self.is_full:
            return False
        file = self._file(key)
        scratch = file.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            if not self._make_room(array.nbytes + _HEADER_BYTES):
                self._stop(f"arrays in use fill its {self.limit_bytes / 1e9:.3g} GB or the disk")
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
        """Lock the making of an array, until the block ends or the process dies.

        Args:
            key: Key of the array. Several keys may share a lock.
            wait: Wait until another process releases the lock. Hold no other claim while waiting.

        Yields:
            Whether the lock was acquired. Look for the array again then: its previous holder may have made it.
        """
        lock = FileLock(self.root / "locks" / f"{key[:3]}.lock")
        try:
            lock.acquire(timeout=LONGEST_WAIT_S if wait else 0)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError):  # a file system without locks: every process makes what is missing
            yield True
            return
        try:
            yield True
        finally:
            lock.release()

    def _file(self, key: str) -> Path:
        return self.root / key[:2] / f"{key[2:]}.npy"

    def _touch(self, key: str) -> bool:
        """Whether the file exists; if so, it counts as used by this run from now on."""
        self._mark_run_active_if_due()
        file = self._file(key)
        try:
            if key not in self._touched and file.stat().st_mtime_ns < self._opened_ns:
                _set_time(file, time.time_ns())
            elif key in self._touched and not file.exists():
                return False
        except FileNotFoundError:
            return False
        except OSError:  # another user's file: its time cannot be set, but it can be read
            return file.exists()
        self._touched.add(key)
        return True

    def _first_active_run_ns(self) -> int:
        """When the first of the active runs opened the store; this run is one of them. Deletes files of past runs."""
        began = [self._opened_ns]
        for run in self._run.parent.iterdir():
            with contextlib.suppress(OSError, ValueError):
                if run.stat().st_mtime < time.time() - RECENT_S:
                    run.unlink()
                else:
                    began.append(int(run.name.partition("-")[0]))
        return min(began)

    def _mark_run_active(self) -> None:
        self._marked_s = time.time()
        self._run.touch()
        _set_time(self._run, time.time_ns())

    def _mark_run_active_if_due(self) -> None:
        if abs(time.time() - self._marked_s) > _SECONDS_BETWEEN_SIGNS:
            with contextlib.suppress(OSError):
                self._mark_run_active()

    def _stop(self, reason: str) -> None:
        self.is_full = True
        logger.warning("cache: %s: no more arrays are added to %s", reason, self.root)

    def _make_room(self, num_bytes: int) -> bool:
        """Whether an array of this size fits, after evicting arrays if necessary."""
        content = self._content
        # Other processes write too: count again whenever this one has added 5 % of the limit.
        if content is None or content.added_bytes > self.limit_bytes / 20:
            content = self._content = self._scan()
        while not self._fits(content.used_bytes + num_bytes, num_bytes):
            if not content.evictable:
                return False
            _, old_bytes, file = content.evictable.pop()
            with contextlib.suppress(OSError):
                if file.stat().st_mtime_ns >= self._kept_since_ns:
                    continue  # used since it was counted
                file.unlink()
            content.used_bytes -= old_bytes
        content.used_bytes += num_bytes
        content.added_bytes += num_bytes
        return True

    def _fits(self, used: int, num_bytes: int) -> bool:
        disk = shutil.disk_usage(self.root)
        kept_free = min(_DISK_KEPT_FREE[0] * disk.total, _DISK_KEPT_FREE[1])
        return used <= self.limit_bytes and disk.free - num_bytes >= kept_free

    def _scan(self) -> _Content:
        content = _Content()
        for file in self.root.glob("??/*"):
            with contextlib.suppress(OSError):
                found = file.stat()
                if file.suffix == ".tmp" and found.st_mtime < time.time() - _TEMPORARY_IS_OLD_S:
                    file.unlink()  # its writer was killed
                    continue
                content.used_bytes += found.st_size
                if file.suffix == ".npy" and found.st_mtime_ns < self._kept_since_ns:
                    content.evictable.append((found.st_mtime_ns, found.st_size, file))
        content.evictable.sort(reverse=True)
        return content


@dataclass
class _Content:
    """What the store held when it was last counted, and what this process has added since.

    `evictable` lists (modification time in ns, bytes, file), the oldest last.
    """

    used_bytes: int = 0
    added_bytes: int = 0
    evictable: list[tuple[int, int, Path]] = field(default_factory=list)


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values as 64 hexadecimal digits: the key of what they describe."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def image_digest(store: ArrayStore, path: str) -> str:
    """SHA-256 of an image file's bytes. The store remembers it by path, size and mtime, so the file is read once.

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
