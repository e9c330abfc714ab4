"""Asking models the phrases of an SA-Co file: each image has phrases of its own, present and absent ones."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.bad_images import WITHOUT_THEM, SkippedImage
from sam3lora.data.coco_file import load_coco_json
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.reading import Asked, read_images
from sam3lora.evaluation.ask.run import ask_batches, progress_of
from sam3lora.evaluation.ask.worker import Models, ModelWorker, adapter_of
from sam3lora.evaluation.metrics.cgf1 import SCORE_THRESHOLD
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.skipped_images import none_readable, unreadable_ahead
from sam3lora.evaluation.split_results import SplitResults

CATEGORY_ID = 1  # SA-Co has one for everything: the phrase is the image entry's


class SacoResults(NamedTuple):
    """What models answered to the phrases of a file.

    Attributes:
        by_label: Label -> results in SA-Co's layout, of detections at or above the threshold.
        image_ids: The entries that were asked.
        skipped: The entries whose images could not be read.
    """

    by_label: dict[str, list[dict[str, Any]]]
    image_ids: set[int]
    skipped: list[SkippedImage]


class SacoWorker(ModelWorker):
    """Asks the images of an SA-Co file for the phrases that belong to each."""

    def ask(self, records: Sequence[Mapping[str, Any]]) -> Asked:
        """Label -> `SplitResults`, by the ids of the phrases' image entries. Raises ImageError as `read_images`."""
        records, images, skipped = read_images(records, self._on_bad_image)
        found = self.detect(images, [[phrase for _, phrase in record["phrases"]] for record in records])
        results = {label: SplitResults() for label in self.labels}
        for label, of_model in results.items():
            for record, of_image in zip(records, found[adapter_of(label)], strict=True):
                for (entry_id, _), detections in zip(record["phrases"], of_image, strict=True):
                    of_model.add(entry_id, CATEGORY_ID, detections)
        return Asked(results, skipped)


def ask_saco(
    ground_truth_file: str | Path,
    image_dir: str | Path,
    models: Models,
    settings: EvaluationSettings,
    *,
    num_workers: int | None = 0,
    address: str | None = None,
    progress: bool = False,
) -> SacoResults:
    """Ask every phrase of the image that it belongs to.

    Args:
        ground_truth_file: One annotator's file; the annotations in it are not looked at.
        image_dir: Folder that its file names are relative to.
        settings: Threshold (at most the 0.5 that cgF1 counts from), suppression, batch size, number of image files.
        num_workers: Ray workers; 0 asks in this process, None takes one for each GPU.

    Raises:
        UserError: The file is damaged, images are missing or cannot be read (unless `settings.on_bad_image` is "skip"),
            or none can be.
    """
    models = models.with_absolute_paths()
    source = Path(ground_truth_file)
    records, missing = _read_records(source, Path(image_dir).absolute())
    if missing and (settings.on_bad_image == "stop" or not records):
        raise UserError(
            f"{source}: {len(missing)} of its images are not in {image_dir}, e.g. {missing[0]['file_name']}: "
            f"name the folder that the file names are relative to, or {WITHOUT_THEM}"
        )
    records = records[: settings.num_samples]
    unread = {one.image_id: one for one in unreadable_ahead(records, str(source), settings.on_bad_image)}
    _check_some_read(source, records, unread)
    lowest_score = min(settings.post_processing(PostProcessing()).threshold, SCORE_THRESHOLD)
    make_worker = functools.partial(SacoWorker, models, settings, lowest_score)
    size = settings.batch_size
    asked_records = [record for record in records if record["image_id"] not in unread]
    batches = [asked_records[start : start + size] for start in range(0, len(asked_records), size)]
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in models.labels}
    sizes_hw = {id_: (record["height"], record["width"]) for record in records for id_, _ in record["phrases"]}
    with progress_of(progress, len(sizes_hw), "phrases") as bar:
        for asked, _ in ask_batches(make_worker, batches, num_workers, models.options.get("device"), address):
            unread |= {one.image_id: one for one in asked.skipped}
            for label, part in asked.answers.items():
                results[label] += [_relative(entry, sizes_hw[entry["image_id"]]) for entry in part.predictions]
            bar.advance(max((len(part.presence) for part in asked.answers.values()), default=0))
    for entries in results.values():
        entries.sort(key=lambda entry: entry["image_id"])
    _check_some_read(source, records, unread)
    skipped = [
        SkippedImage(entry_id, record["path"], unread[record["image_id"]].reason)
        for record in records
        if record["image_id"] in unread
        for entry_id, _ in record["phrases"]
    ]
    asked_ids = set(sizes_hw) - {one.image_id for one in skipped}
    if settings.num_samples is None:
        skipped += [
            SkippedImage(entry_id, record["path"], "no such file")
            for record in missing
            for entry_id, _ in record["phrases"]
        ]
    return SacoResults(results, asked_ids, skipped)


def _read_records(source: Path, image_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One record per image file, with (entry id, phrase) of all that is asked of it: those that exist, and the others.

    `image_id` is the id of the first entry.
    """
    records: dict[str, dict[str, Any]] = {}
    for position, entry in enumerate(load_coco_json(source)["images"]):
        lacks = [key for key in ("id", "file_name", "text_input", "height", "width") if key not in entry]
        if lacks:
            raise UserError(f"{source}: images[{position}] lacks {', '.join(lacks)}; expected the SA-Co layout")
        name = entry["file_name"]
        if name not in records:
            size = {"height": entry["height"], "width": entry["width"]}
            path = str(image_dir / name)
            records[name] = {"image_id": entry["id"], "file_name": name, "path": path, **size, "phrases": []}
        records[name]["phrases"].append((entry["id"], entry["text_input"]))
    if not records:
        raise UserError(f"{source} lists no image, so there is nothing to ask")
    exist = {name: os.path.isfile(record["path"]) for name, record in records.items()}
    return (
        [record for name, record in records.items() if exist[name]],
        [record for name, record in records.items() if not exist[name]],
    )


def _check_some_read(source: Path, records: Sequence[Any], unread: Mapping[int, SkippedImage]) -> None:
    if len(unread) == len(records):
        raise none_readable(str(source), list(unread.values()))


def _relative(entry: Mapping[str, Any], size_hw: tuple[int, int]) -> dict[str, Any]:
    """SA-Co has boxes in parts of the image's size."""
    height, width = size_hw
    x, y, box_width, box_height = entry["bbox"]
    bbox = [round(value, 5) for value in (x / width, y / height, box_width / width, box_height / height)]
    return {**entry, "bbox": bbox, "score": round(entry["score"], 5)}
