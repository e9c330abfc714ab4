"""The files of an adapter folder, and reading them within bounds: others may have written them.

A file is read only if it is a regular one (opening a pipe would wait for ever), and JSON only up to a size and a number
of values that are parsed in milliseconds.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sam3lora.errors import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
METADATA_FILE = "sam3lora.json"
HEAD_FILE = "dense_head.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, HEAD_FILE)

MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_VALUES = 100_000


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether the folder has the files of a complete adapter, or of a dense head; they are not opened."""
    complete = ((CONFIG_FILE, WEIGHTS_FILE), (HEAD_FILE, METADATA_FILE))
    return any(all((Path(folder) / file).is_file() for file in files) for files in complete)


@contextmanager
def open_regular(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, links followed, and its size in bytes.

    Raises:
        UserError: It is a folder, a pipe or a device.
        OSError: It cannot be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise UserError(f"{file} is no regular file: put the file itself there")
    with os.fdopen(descriptor, "rb") as opened:
        yield opened, found.st_size


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: The file is too large, or holds no JSON object.
        OSError: It cannot be read.
    """
    content = read_small(file)
    # Each value but the first has a comma or a bracket before it. Counted before parsing, which holds the interpreter.
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise UserError(f"{file} has too many values: expected at most {MAX_JSON_VALUES}")
    try:
        values = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{file} is damaged: its values are nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def read_small(file: Path) -> bytes:
    """The content of a file of at most `MAX_JSON_BYTES`.

    Raises:
        UserError: It is larger, or no regular file.
        OSError: It cannot be read.
    """
    with open_regular(file) as (opened, size):
        content = b"" if size > MAX_JSON_BYTES else opened.read(MAX_JSON_BYTES + 1)
        if max(size, len(content)) > MAX_JSON_BYTES:
            raise UserError(f"{file} is too large: expected at most {MAX_JSON_BYTES} bytes, got {size}")
        return content


def shown(value: object) -> str:
    """A value of a file as a short text for an error."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60
