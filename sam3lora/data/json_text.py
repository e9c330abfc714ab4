"""What a JSON file of labels holds, told from its text, which may be long: it is neither parsed nor kept in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_WINDOW_BYTES, _OVERLAP_BYTES = 2**20, 2**12
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def has_lists(path: Path, *keys: str) -> bool:
    """Whether a JSON file has a list under each of these keys, at any depth."""
    missing = {re.compile(rf'"{key}"\s*:\s*\['.encode()) for key in keys}
    for window in _windows(path):
        missing = {pattern for pattern in missing if not pattern.search(window)}
        if not missing:
            return True
    return False


def first_file_names(path: Path, number: int) -> list[str]:
    """File names of the first images of a COCO file; the file is read only as far as needed."""
    names: dict[str, None] = {}
    for window in _windows(path):
        for match in _FILE_NAME.finditer(window):
            with suppress(ValueError):  # of a damaged file, which reading will name
                names[json.loads(match[1]).replace("\\", "/")] = None
        if len(names) >= number:
            break
    return list(names)[:number]


def _windows(path: Path) -> Iterator[bytes]:
    """The content of a file in parts, each of which begins with the end of the one before."""
    try:
        handle = path.open("rb")
    except OSError:
        return
    with handle:
        overlap = b""
        while block := handle.read(_WINDOW_BYTES):
            window = overlap + block
            yield window
            overlap = window[-_OVERLAP_BYTES:]
