"""Files of an evaluation's results; what the system refuses is told as a mistake of the user."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3lora.data.fault_report import SplitFault, left_out_sentence
from sam3lora.errors import UserError
from sam3lora.evaluation.skipped_images import skipped_note
from sam3lora.files import write_whole
from sam3lora.local_paths import refuse_bad_path


def left_out_notes(
    faults: Sequence[SplitFault], skipped_images: Sequence[Mapping[str, Any]], num_images: int
) -> list[str]:
    """What is no part of the metrics of so many images, in sentences for a terminal."""
    notes = []
    if left_out := left_out_sentence(faults):
        notes.append(f"{left_out}, see the report")
    if skipped_images:
        notes.append(skipped_note(skipped_images, num_images))
    return notes


def make_folder(path: str | Path) -> Path:
    """Make a folder of results; its absolute path. Raises UserError if it cannot be made, as the others here do."""
    refuse_bad_path(path, "the output folder")
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --output") from None
    return folder


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(values, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with told(path):
        write_whole(path, text)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise what the system refuses as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --output") from None
