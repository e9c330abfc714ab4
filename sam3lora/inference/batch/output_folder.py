"""The output folder of a batch run: its settings, and the parts that its workers have finished.

A part holds the results of some images, a JSON line each behind a first line about the model. It is written beside and
moved into place, so that a part that is there is whole, after any crash; what is in no part has not been done.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sam3lora.errors import UserError
from sam3lora.files import remove
from sam3lora.folder_lock import LOCK_FILE, locked_folder
from sam3lora.inference.dense.files import LABELS, OVERLAYS, PROBABILITIES

MANIFEST, PARTS = "batch.json", "parts"
PREDICTIONS, BAD_IMAGES, DATASET = "predictions.json", "bad_images.json", "dataset"
_RESULTS = (PARTS, LABELS, OVERLAYS, PROBABILITIES, PREDICTIONS, BAD_IMAGES, DATASET)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write that appears under its name when the block ends well, and is on the disk then."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with scratch.open("w", encoding="ascii") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def open_output(folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[None]:
    """Begin a run in ``folder``, or go on with the one that is there; no other start can do so during the block.

    Args:
        settings: JSON values that decide the results; a run goes on only with the same ones.
        overwrite: Remove an earlier run first. Files that are not of a run stay.

    Raises:
        UserError: The folder holds a run with other settings, or something else, or another start has it open.
    """
    is_unused = not folder.exists() or (folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir()))
    if _read_settings(folder) is None and not is_unused:
        raise UserError(f"--output {folder} is not empty and holds no batch run: choose a new folder")
    with locked_folder(folder, "writing results"):
        _prepare(folder, settings, overwrite)
        yield


def _prepare(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    earlier = _read_settings(folder)
    if earlier is not None and not overwrite:
        _check_same(earlier, json.loads(json.dumps(settings)), folder)
    else:
        for name in _RESULTS if earlier is not None else ():
            remove(folder / name)
        try:
            with written_whole(folder / MANIFEST) as handle:
                json.dump({"sam3lora_batch": 1, "settings": settings}, handle, indent=2)
        except OSError as error:
            raise UserError(f"cannot write to --output {folder}: {error.strerror}") from None
    parts = folder / PARTS
    parts.mkdir(exist_ok=True)
    for stale in [*folder.glob(".*.tmp"), *parts.glob(".*.tmp"), *parts.glob("*.tries")]:
        remove(stale)


def part_path(folder: Path, run: str, number: int) -> Path:
    """Where a shard's part belongs. ``run`` tells the starts of a batch run apart."""
    return folder / PARTS / f"{run}-{number:06d}.jsonl"


def count_tries(part: Path) -> int:
    """How often a part has been begun, this time included; read and written by one worker at a time."""
    tries = part.with_suffix(".tries")
    with tries.open("ab") as handle:
        handle.write(b".")
    return tries.stat().st_size


def write_part(path: Path, base_fingerprint: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write results of images: ``{"path", "size_hw", "detections"}``, or ``{"path", "error"}`` for a bad image."""
    with written_whole(path) as handle:
        handle.write(json.dumps({"base_fingerprint": base_fingerprint}) + "\n")
        handle.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    path.with_suffix(".tries").unlink(missing_ok=True)


def read_part(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()[1:]]


class _Place(NamedTuple):
    part: Path
    offset: int
    error: str | None


@dataclass
class Finished:
    """What the parts hold: where the result of each image is, by path, and the base model it came from."""

    places: dict[str, _Place] = field(default_factory=dict, repr=False)
    base_fingerprint: str | None = None

    @functools.cached_property
    def errors(self) -> dict[str, str]:
        """Path -> why the image has no result."""
        return {path: place.error for path, place in self.places.items() if place.error is not None}

    def record(self, path: str) -> dict[str, Any]:
        place = self.places[path]
        with place.part.open("rb") as handle:
            handle.seek(place.offset)
            return json.loads(handle.readline())


def read_parts(folder: Path) -> Finished:
    """Read all finished parts of an output folder; of two results of an image a good one counts."""
    finished = Finished()
    for part in sorted((folder / PARTS).glob("*.jsonl")):
        with part.open("rb") as handle:
            finished.base_fingerprint = json.loads(handle.readline())["base_fingerprint"]
            offset = handle.tell()
            for line in handle:
                record = json.loads(line)
                path, error = record["path"], record.get("error")
                if error is None or path not in finished.places:
                    finished.places[path] = _Place(part, offset, error)
                offset += len(line)
    return finished


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the run in the folder; None if there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return manifest["settings"] if manifest["sam3lora_batch"] == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    changed = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {earlier.get(name)}, now {now.get(name)}" for name in changed)
        raise UserError(
            f"{folder} holds a run with other settings ({listed}): go on with those, choose another --output, or start "
            "anew with --overwrite"
        )
