"""A worker of a batch run: a model replica that turns shards of images into finished parts."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import torch

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.ids import IdKey
from sam3lora.data.images import ImageError, read_image
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.halving import run_in_halves
from sam3lora.errors import UserError
from sam3lora.inference.batch.askers import load_asker
from sam3lora.inference.batch.image_list import ImageSource
from sam3lora.inference.batch.output_folder import MANIFEST, count_tries, part_path, read_part, write_part
from sam3lora.model.dense.settings import DenseSettings

_TRIES = 3  # of a shard: one that kills its worker would be tried without end


@dataclass(frozen=True)
class ModelChoice:
    """What a worker loads: arguments of `AdapterPool`, with at most one adapter."""

    model: str | None = None
    adapter: str | None = None
    revision: str | None = None
    resolution: int | None = None


@dataclass(frozen=True)
class WorkerSettings:
    """What all workers of a run are told.

    Attributes:
        output, input_root: Folders that every worker must see.
        run: Tells this start from earlier ones.
        categories: Prompt, or foreground class -> category id.
        dense: Of a dense folder, with the threshold that counts; the categories are then its foreground classes, and
            ``post`` plays no part. None asks for prompts.
        batch_size: Images of one vision pass.
        base_fingerprint: Of the base model that earlier parts came from; None before there are any.
    """

    output: Path
    input_root: Path
    run: str
    choice: ModelChoice
    categories: Mapping[str, IdKey]
    post: PostProcessing
    batch_size: int
    overlays: bool
    base_fingerprint: str | None
    dense: DenseSettings | None = None
    probabilities: bool = False
    device: str = "cpu"
    num_threads: int = 1


class ShardWorker:
    """Loads the model once, then takes shards; for the actor pool of `Dataset.map`.

    A user's mistake that only shows here (a prompt that is too long, a folder that this host does not see) comes back
    in the rows: exceptions of actors arrive as Ray's, and a failing constructor is tried again without end.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._mistake = ""
        torch.set_num_threads(settings.num_threads)
        cv2.setNumThreads(1)
        self._readers = ThreadPoolExecutor(settings.num_threads)
        try:
            self._check_folders()
            self._asker = load_asker(settings)
        except UserError as error:
            self._mistake = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Take the shard ``{"number": int, "images": JSON list of ImageSource}``.

        Returns:
            `num_images`, `num_bad`, and as text what ends the run, "" if nothing does: a user's `mistake` or a
            `failure`.
        """
        counts = {"mistake": self._mistake, "failure": "", "num_images": 0, "num_bad": 0}
        if self._mistake:
            return counts
        path = part_path(self._settings.output, self._settings.run, row["number"])
        sources = [ImageSource(*values) for values in json.loads(row["images"])]
        if path.exists():  # by a worker that died before it could say so
            records = read_part(path)
        elif count_tries(path) > _TRIES:
            names = ", ".join(source.name for source in sources)
            return counts | {"failure": f"{_TRIES} workers died while they were busy with one of {names}"}
        else:
            records = list(self._records(sources))
            write_part(path, self._asker.base.fingerprint, records)
        return counts | {"num_images": len(records), "num_bad": sum("error" in record for record in records)}

    def _check_folders(self) -> None:
        for path in (self._settings.output / MANIFEST, self._settings.input_root):
            if not path.exists():
                raise UserError(
                    f"host {socket.gethostname()} does not see {path}: input and output must be on storage that all "
                    "hosts of the cluster share, at the same place"
                )

    def _records(self, sources: Sequence[ImageSource]) -> Iterator[dict[str, Any]]:
        for batch in self._batches(sources):
            good = [(source, image) for source, image in batch if isinstance(image, np.ndarray)]
            yield from ({"path": source.path, "error": error} for source, error in batch if isinstance(error, str))
            images = [image for _, image in good]
            found = run_in_halves(self._ask, images, lambda _: self._asker.free_memory()) if good else []
            for (source, image), answer in zip(good, found, strict=True):
                if answer is None or isinstance(answer, Exception):
                    yield {"path": source.path, "error": _reason(answer)}
                    continue
                detections = self._asker.results(source, image, answer)
                yield {"path": source.path, "size_hw": image.shape[:2], "detections": detections}

    def _ask(self, images: list[np.ndarray]) -> Sequence[Any] | None:
        """The answer for each image, or the error of a single one; None if fewer images may succeed."""
        try:
            return self._asker.ask(images)
        except Exception as error:
            if is_device_error(error):
                end_process(error)
            if len(images) > 1 or is_out_of_memory(error):
                return None
            return [error]

    def _batches(self, sources: Sequence[ImageSource]) -> Iterator[list[tuple[ImageSource, np.ndarray | str]]]:
        """Decoded images, or why not; the next batch is read while the model is busy with one."""
        size = self._settings.batch_size
        batches = [sources[start : start + size] for start in range(0, len(sources), size)]
        ahead: list[Future[np.ndarray | str]] = self._submit(batches[0])
        for position, batch in enumerate(batches):
            current, ahead = ahead, self._submit(batches[position + 1]) if position + 1 < len(batches) else []
            yield [(source, future.result()) for source, future in zip(batch, current, strict=True)]

    def _submit(self, sources: Sequence[ImageSource]) -> list[Future[np.ndarray | str]]:
        return [self._readers.submit(_read, source) for source in sources]


def end_process(error: Exception) -> NoReturn:
    """End a worker whose device no longer answers: another takes its images. An exception would end the run."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def _reason(error: Exception | None) -> str:
    """Why the model gave no answer for an image."""
    if error is None:
        return "memory ran out for this image alone"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _read(source: ImageSource) -> np.ndarray | str:
    """The image, or the reason why it cannot be had: one bad file among many stops nothing."""
    try:
        # Coordinates of a COCO file refer to the stored pixels; other images are asked the way people see them.
        return read_image(source.path, source.size_hw, orientation="stored" if source.size_hw else "exif")
    except ImageError as error:
        return str(error).removeprefix(f"cannot read image {source.path}: ")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
