"""`evaluate_dense`: from a data folder and a dense folder to metrics."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, cast

from sam3lora.data.split_files import SplitFiles
from sam3lora.evaluation.ask.dense_worker import DenseAnswers, DenseWorker
from sam3lora.evaluation.ask.run import (
    RecordBatches,
    ask_batches,
    label_of,
    progress_of,
    read_split,
)
from sam3lora.evaluation.dense.map_files import MapFolder, png_names
from sam3lora.evaluation.dense.measure import DenseMetrics, measure_dense
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.dense.split_meter import DenseMeter
from sam3lora.evaluation.dense.truth import label_notes, true_labels
from sam3lora.evaluation.skipped_images import SkippedImages
from sam3lora.local_paths import absolute_base, absolute_path
from sam3lora.model.adapter.metadata import current_versions
from sam3lora.model.dense.folder import read_dense_metadata
from sam3lora.model.dense.settings import DenseSettings


def evaluate_dense(
    split: SplitFiles | Path,
    folder: str | Path,
    settings: DenseEvaluation | None = None,
    *,
    label: str | None = None,
    keep_in: Path | None = None,
    num_workers: int | None = 0,
    address: str | None = None,
    progress: bool = False,
    **options: Any,
) -> DenseMetrics:
    """Measure a folder of task dense on a COCO split.

    Args:
        split: A split, or its folder.
        folder: The dense folder.
        label: Name of the model; None takes that of the folder.
        keep_in: Folder for the predicted maps, one PNG an image; None keeps none, and a report has no pictures.
        num_workers: Ray workers; 0 measures in this process, None takes one for each GPU.
        address: Of a Ray cluster.
        options: `model`, `resolution`, `device`, `precision` and so on of `DenseEngine.load`.

    Raises:
        UserError: No such folder, a damaged file, an option that has no effect, or data of other classes.
        ImageError: An image cannot be read; with `settings.on_bad_image` "skip" none can be.
    """
    started = time.perf_counter()
    settings = settings or DenseEvaluation()
    metadata = read_dense_metadata(folder)
    model = settings.of_model(DenseSettings(**(metadata.dense or {})))
    labels = true_labels(metadata, model)
    split, index, faults = read_split(split, settings, tell=progress)
    skipped = SkippedImages(index, settings.num_samples)
    index = skipped.look_ahead(settings.on_bad_image)
    notes = label_notes(labels, index.names, index.source)
    if options.get("model"):
        options["model"] = absolute_base(options["model"])
    ids, file_names = (index.table.column(name).to_pylist() for name in ("image_id", "file_name"))
    maps = None if keep_in is None else MapFolder(keep_in, dict(zip(ids, png_names(file_names), strict=True)), model)
    make_worker = functools.partial(
        DenseWorker, absolute_path(str(folder)), options, settings, keep_maps=maps is not None
    )
    meter = DenseMeter(model, labels, normalise=settings.paper_normalisation)
    facts: dict[str, Any] = {}
    with progress_of(progress, len(index), "images") as bar:
        for asked, of_worker in ask_batches(
            make_worker, RecordBatches(index, settings.batch_size), num_workers, options.get("device"), address
        ):
            answers, facts = cast(DenseAnswers, asked.answers), of_worker
            skipped.add(asked.skipped)
            meter.merge(answers.meter)
            if maps is not None:
                for image_id, of_image in answers.maps.items():
                    maps.write(image_id, of_image)
            bar.advance(len(answers.maps) + len(asked.skipped))
    return measure_dense(
        meter,
        model,
        skipped.readable(),
        label=label or label_of(folder),
        settings={
            "data": str(split),
            "adapter": str(folder),
            **facts,
            **settings.to_dict(),
            **({} if model.mode == "multiclass" else {"threshold": model.threshold}),
            "versions": current_versions(),
        },
        notes=notes,
        predictions=maps,
        seconds=time.perf_counter() - started,
        faults=skipped.faults(split.title, faults),
        skipped_images=skipped.listed(),
    )
