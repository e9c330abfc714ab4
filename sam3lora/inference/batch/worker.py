"""A worker of a batch run: a model replica that turns shards of images into finished parts."""

from __future__ import annotations

import functools
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
from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.engine.detections import Detections
from sam3lora.engine.device import is_device_error, is_out_of_memory
from sam3lora.engine.halving import run_in_halves
from sam3lora.errors import UserError
from sam3lora.inference.batch.image_list import ImageSource
from sam3lora.inference.batch.output_folder import MANIFEST, OVERLAYS, count_tries, part_path, read_part, write_part
from sam3lora.inference.drawing import draw_instances, encode_image, mark_coco
from sam3lora.model.tokenization import tokenize

_ADAPTER = "adapter"
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
        categories: Prompt -> category id.
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
            self._pool = _load(settings)
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
            write_part(path, self._pool.base.fingerprint, records)
        return counts | {"num_images": len(records), "num_bad": sum("error" in record for record in records)}

    def _check_folders(self) -> None:
        for path in (self._settings.output / MANIFEST, self._settings.input_root):
            if not path.exists():
                raise UserError(
                    f"host {socket.gethostname()} does not see {path}: input and output must be on storage that all "
                    "hosts of the cluster share, at the same place"
                )

    def _records(self, sources: Sequence[ImageSource]) -> Iterator[dict[str, Any]]:
        settings = self._settings
        prompts, adapter = list(settings.categories), settings.choice.adapter and _ADAPTER
        for batch in self._batches(sources):
            good = [(source, image) for source, image in batch if isinstance(image, np.ndarray)]
            yield from ({"path": source.path, "error": error} for source, error in batch if isinstance(error, str))
            asked = functools.partial(self._ask, prompts=prompts, adapter=adapter)
            found = (
                run_in_halves(asked, [image for _, image in good], lambda _: self._pool.free_memory()) if good else []
            )
            for (source, image), of_image in zip(good, found, strict=True):
                if of_image is None or isinstance(of_image, Exception):
                    yield {"path": source.path, "error": _reason(of_image)}
                    continue
                detections = [entry for one in of_image for entry in _results(one, settings.categories[one.prompt])]
                if settings.overlays:
                    self._draw(source, image, detections)
                yield {"path": source.path, "size_hw": image.shape[:2], "detections": detections}

    def _ask(
        self, images: list[np.ndarray], *, prompts: list[str], adapter: str | None
    ) -> Sequence[list[Detections] | Exception] | None:
        """The detections of each image, or the error of a single one; None if fewer images may succeed."""
        try:
            return self._pool.detect(images, prompts, adapter=adapter, post=self._settings.post)
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

    def _draw(self, source: ImageSource, image: np.ndarray, detections: Sequence[Mapping[str, Any]]) -> None:
        names = {id_: prompt for prompt, id_ in self._settings.categories.items()}
        path = self._settings.output / OVERLAYS / f"{source.name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(draw_instances(image, mark_coco(detections, names, image.shape[:2]))))


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


def _load(settings: WorkerSettings) -> AdapterPool:
    choice, expected = settings.choice, settings.base_fingerprint
    pool = AdapterPool(
        choice.model,
        adapters={_ADAPTER: choice.adapter} if choice.adapter else None,
        revision=choice.revision,
        resolution=choice.resolution,
        device=settings.device,
    )
    tokenize(pool.base.tokenizer, list(settings.categories))  # a prompt that is too long: before any work
    found = pool.base.fingerprint
    if expected is not None and expected != found:
        raise UserError(
            f"{settings.output} holds results of another base model (fingerprint {expected[:12]}) than this "
            f"{pool.base.name} ({found[:12]}): choose another --output, or start anew with --overwrite"
        )
    return pool


def _read(source: ImageSource) -> np.ndarray | str:
    """The image, or the reason why it cannot be had: one bad file among many stops nothing."""
    try:
        # Coordinates of a COCO file refer to the stored pixels; other images are asked the way people see them.
        return read_image(source.path, source.size_hw, orientation="stored" if source.size_hw else "exif")
    except ImageError as error:
        return str(error).removeprefix(f"cannot read image {source.path}: ")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _results(found: Detections, category_id: IdKey) -> list[dict[str, Any]]:
    """COCO results without the image id, which is known at the end of the run."""
    return [
        {name: value for name, value in result.items() if name != "image_id"}
        | {"category_id": category_id, "score": round(result["score"], 6)}
        for result in found.to_coco(0, 0)
    ]
