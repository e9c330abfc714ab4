"""Kept indexes of large annotation files, which workers and later runs map instead of parsing the file again.

A file is known by its content and its path, together with the folder of its images and the names of the files in it. A
changed file, another version of this package, and an added or a removed image make a new index. So does a change of an
image whose size the annotation file lacks. That of a small file is not kept: reading it again takes no time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from sam3lora import __version__
from sam3lora.data.image_files import ImageFiles
from sam3lora.data.label_table import SCHEMA
from sam3lora.files import cache_folder, whole_file

logger = logging.getLogger(__name__)

MIN_BYTES = 4_000_000
"""Smaller annotation files are read again each time."""

MAX_AGE_S = 60 * 24 * 3600
"""An index that was not used for so long is removed when another one is kept."""

_FORMAT = 1  # raise it when the same file gives another index
_KEY = b"sam3lora"
_MAX_WAIT_S = 600


@dataclass
class KeptIndex:
    """The kept index of a file (`table` and `facts`), or the place where one can be saved."""

    file: Path | None = None
    table: pa.Table | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, table: pa.Table, facts: Mapping[str, Any], files: ImageFiles, measured: Iterable[str]) -> None:
        """Keep an index, in place of earlier ones of the same file; nothing happens where that is not possible.

        `files` knows the folders of the images; those `measured` are images whose size was read from their files.
        """
        if self.file is None:
            return
        listing = {
            "folders": files.folders,
            "listing": _digest_names(files, files.folders),
            "measured": [[path, _state(path)] for path in measured],
        }
        schema = SCHEMA.with_metadata({_KEY: json.dumps({"facts": dict(facts), **listing})})
        try:
            with whole_file(self.file) as scratch, pa.ipc.new_file(str(scratch), schema) as writer:
                for batch in table.to_batches():
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            own = self.file.name.split("-")[0]
            for other in self.file.parent.glob("*.arrow"):
                is_older = other.name.startswith(f"{own}-") and other != self.file
                if is_older or other.stat().st_mtime < time.time() - MAX_AGE_S:
                    other.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("the index is not kept: %s", error)


@contextmanager
def kept_index(source: Path, image_dir: Path) -> Iterator[KeptIndex]:
    """The kept index of an annotation file, while no other process makes it; without a table if there is none."""
    file = _file_of(source, image_dir)
    if file is None:
        yield KeptIndex()
        return
    lock = FileLock(file.with_name(f"{file.name.split('-')[0]}.lock"), timeout=_MAX_WAIT_S)
    try:
        lock.acquire()
    except (OSError, NotImplementedError, Timeout) as error:  # no locks on this drive, or no room
        logger.debug("no lock on %s: %s", file, error)
    try:
        yield _load(file)
    finally:
        lock.release()


def _file_of(source: Path, image_dir: Path) -> Path | None:
    """Where the index of a file with this content is kept; None for a small one, or where nothing can be written."""
    try:
        if source.stat().st_size < MIN_BYTES:
            return None
        folder = cache_folder() / "index"
        folder.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None
    place = f"{source.absolute()}\n{image_dir.absolute()}"
    own = hashlib.sha256(f"{_FORMAT}\n{__version__}\n{place}\n{content}".encode()).hexdigest()
    return folder / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}-{own[:32]}.arrow"


def _load(file: Path) -> KeptIndex:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        kept = json.loads(table.schema.metadata[_KEY])
        same_names = _digest_names(ImageFiles(Path()), kept["folders"]) == kept["listing"]
        if (
            same_names
            and table.schema.equals(SCHEMA)
            and all(_state(path) == state for path, state in kept["measured"])
        ):
            os.utime(file)
            return KeptIndex(file, table.replace_schema_metadata(None), kept["facts"])
    except (OSError, KeyError, TypeError, ValueError):  # none yet, or a damaged one
        pass
    return KeptIndex(file)


def _state(path: str) -> list[int] | None:
    """What changes with the content of a file; None without one."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _digest_names(files: ImageFiles, folders: Iterable[str]) -> str:
    """Digest of the names of all files in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update("\n".join([folder, *sorted(files.names_in(folder))]).encode(errors="surrogateescape"))
    return digest.hexdigest()
