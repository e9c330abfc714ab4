"""A lock on a folder: of the processes of all hosts that share it, one at a time may write its results there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from sam3lora.errors import UserError

LOCK_FILE = ".lock"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked_folder(folder: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing, while the block runs.

    The system ends the lock with this process, however that ends; processes that it starts do not inherit it. On a file
    system without locks the block runs without one, and a warning says so.

    Args:
        folder: The lock is a hidden file in it, which names the holder and is removed with the lock.
        doing: What the holder does, for the message, such as "training".

    Raises:
        UserError: Another process holds the lock, whose host and process the message names; or the folder cannot be
            written to.
    """
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(file, doing)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror or error}): choose another folder") from error
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds, without a name
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock ends, so that nobody else's file is removed
        os.close(descriptor)


def _open_locked(file: Path, doing: str) -> int:
    """A descriptor of the lock file, which is still under its name once it is locked."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, descriptor):
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"another process is {doing} in {file.parent}{holder}: wait until it ends, stop it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            logger.warning("%s has no file locks (%s): start no second run there", file.parent, error.strerror)
            return descriptor
        os.close(descriptor)  # the holder before removed the file between our opening and locking it


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Host and process of the holder in brackets; nothing if it has not written them yet."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {holder['process']} on host {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
