"""`evaluate`: from a data folder and adapter folders to metrics."""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.data.fault_report import SplitFault, fault_summary, faults_as_reason, split_faults
from sam3lora.data.split_files import WHOLE, SplitFiles, find_split_or_whole
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.reading import Asked
from sam3lora.evaluation.ask.worker import BASE, Batches, EvaluationWorker, Models
from sam3lora.evaluation.dense.class_counts import ClassCounts
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory, SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.measure import SplitMetrics, measure_matches
from sam3lora.evaluation.predictions import Predictions
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.skipped_images import SkippedImages
from sam3lora.evaluation.split_matches import Matcher, SplitMatches
from sam3lora.model.adapter.folder import read_metadata
from sam3lora.model.adapter.metadata import current_versions
from sam3lora.progress import Progress


def evaluate(
    data_dir: str | Path,
    *,
    adapter: str | Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    split: str = "valid",
    settings: EvaluationSettings | None = None,
    resolution: int | None = None,
    geometry_cls: bool | None = None,
    device: Any = None,
    precision: str | None = None,
    num_workers: int | None = 0,
    address: str | None = None,
    progress: bool = False,
    **changes: Any,
) -> SplitMetrics:
    """Measure an adapter, or a base model, on a COCO split.

    What is None is taken from the adapter's metadata, so that it is measured the way it was trained.

    Args:
        data_dir: Folder that holds `split`, or the split itself.
        adapter: Adapter folder; None measures the base model.
        model: Base model: "tiny", a hub id or a folder. Without an adapter, None is the built-in tiny model.
        revision: Branch, tag or commit of a hub id.
        settings: Post-processing, categories and so on; None takes what the adapter records.
        resolution: Side of the model's input in pixels.
        geometry_cls: Whether text prompts are followed by the geometry CLS token; without an adapter, None is True.
        device: None takes a GPU if there is one.
        precision: See `AdapterPool`.
        num_workers: Ray workers; 0 measures in this process, None takes one for each GPU.
        address: Of a Ray cluster.
        changes: Fields of `settings` or of `PostProcessing` to change, such as `threshold`.

    Raises:
        UserError: No such folder, a damaged file, or an adapter of another base model.
        ImageError: An image cannot be read; with `on_bad_image="skip"` none can be.
    """
    options = {
        "model": model,
        "revision": revision,
        "resolution": resolution,
        "geometry_cls": geometry_cls,
        "device": device,
        "precision": precision,
    }
    adapters = {} if adapter is None else {label_of(adapter): str(adapter)}
    settings = (settings or EvaluationSettings(**recorded_data(adapters))).changed(**changes)
    models = Models(adapters, with_base=adapter is None, options=options)
    (metrics,) = evaluate_models(
        find_split_or_whole(data_dir, split, settings.annotation_file),
        models,
        settings,
        num_workers=num_workers,
        address=address,
        progress=progress,
    )
    return metrics


def evaluate_models(
    split: SplitFiles | Path,
    models: Models,
    settings: EvaluationSettings,
    *,
    num_workers: int | None = 0,
    address: str | None = None,
    progress: bool = False,
) -> list[SplitMetrics]:
    """Measure several models on the same images, in the same way: metrics for each of `models.labels`.

    `split` may be the folder of a split.
    """
    started = time.perf_counter()
    models = models.with_absolute_paths()
    split, index, faults = read_split(split, settings, tell=progress)
    skipped = SkippedImages(index, settings.num_samples)
    index = skipped.look_ahead(settings.on_bad_image)
    categories = asked_categories(index, settings)
    if not categories:
        raise UserError(
            f"{index.source}: no category has an object, so there is nothing to ask: name some as "
            "data.categories of a configuration (--config)" + faults_as_reason(skipped.faults(split.title, faults))
        )
    num_pairs = len(index) * len(categories)
    make_worker = functools.partial(EvaluationWorker, models, categories, settings, settings.score_floor(num_pairs))
    parts: dict[str, list[SplitMatches]] = {label: [] for label in models.labels}
    predictions = {label: Predictions(index.table.column("image_id").to_pylist()) for label in models.labels}
    semantic = {label: ClassCounts(len(categories)) for label in models.labels} if settings.semantic else {}
    facts: dict[str, Any] = {}
    with progress_of(progress, len(index), "images", f"{len(categories)} prompts each") as bar:
        batches = RecordBatches(index, settings.batch_size)
        for asked, of_worker in ask_batches(make_worker, batches, num_workers, models.options.get("device"), address):
            facts = of_worker
            skipped.add(asked.skipped)
            for label, answer in asked.answers.items():
                parts[label].append(answer.matches)
                predictions[label].add(answer.encoded)
                if answer.semantic is not None:
                    semantic[label].merge(answer.semantic)
            num_read = max((len(answer.matches.image_ids) for answer in asked.answers.values()), default=0)
            bar.advance(num_read + len(asked.skipped))
    truth = SplitTruth(skipped.readable(), categories)
    faults = skipped.faults(split.title, faults)
    posts: dict[str, PostProcessing] = facts["post"]
    shown = settings.to_dict() | {name: value for name, value in facts.items() if name not in ("num_queries", "post")}
    return [
        measure_matches(
            truth,
            SplitMatches.join(parts.pop(label), truth.image_ids, len(categories)),
            Matcher(categories, posts[label], settings.incomplete(categories)),
            label=label,
            predictions=predictions[label],
            num_queries=facts["num_queries"],
            semantic=semantic.get(label),
            settings={
                "data": str(split),
                "adapter": models.adapters.get(label),
                **shown,
                **posts[label].model_dump(mode="json"),
                "geometry_cls": facts["geometry_cls"][label],
                "versions": current_versions(),
            },
            split_dir=split.image_dir,
            seconds=time.perf_counter() - started,
            notes=floor_notes(facts["lowest_score"], num_pairs),
            faults=faults,
            skipped_images=skipped.listed(),
        )
        for label in models.labels
    ]


def read_split(
    split: SplitFiles | Path, settings: EvaluationSettings | DenseEvaluation, *, tell: bool
) -> tuple[SplitFiles, CocoIndex, Sequence[SplitFault]]:
    """A split, found if only its folder is named, with all its images, and the faults of its annotation file.

    `tell` prints the faults.
    """
    if not isinstance(split, SplitFiles):
        split = find_split_or_whole(split, WHOLE, settings.annotation_file)
    index = split.read(settings.on_bad_image)
    faults = split_faults(split.title, index.faults)
    if tell and faults:
        print(fault_summary(faults, split.folder), flush=True)
    return split, index, faults


@dataclass(frozen=True)
class RecordBatches:
    """The records of an index, `size` images at a time, read when they are asked for."""

    index: CocoIndex
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.size)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = number * self.size
        return [self.index.record(row) for row in range(start, min(start + self.size, len(self.index)))]


def floor_notes(lowest_score: float, num_pairs: int) -> list[str]:
    """What to know of a floor for scores."""
    if not lowest_score:
        return []
    return [
        f"detections with a score below {lowest_score:g} are not measured ({num_pairs:,} pairs of image and prompt): "
        "mAP can be slightly lower than with all of them (--lowest-score 0)"
    ]


def asked_categories(
    index: CocoIndex, settings: EvaluationSettings, more: Sequence[str] = ()
) -> list[PromptedCategory]:
    """What is asked of every image: the split's categories, or those named, and the prompts that no image shows.

    `more` names further categories that the split lists.
    """
    known = settings.categories if settings.categories is not None else index.names
    return prompted_categories(index, [*known, *more, *settings.negative_prompts], settings.prompts)


def label_of(adapter: str | Path, taken: Mapping[str, str] | Sequence[str] = ()) -> str:
    """A short name: the run's for its `best` or `last`, the folder's own otherwise.

    >>> label_of("outputs/potholes/best"), label_of("adapters/weeds")
    ('potholes', 'weeds')
    """
    folder = Path(adapter)
    name = folder.name or folder.resolve().name
    parent = folder.parent.name or folder.resolve().parent.name
    label = parent if name == "best" and parent else f"{parent}/{name}" if name == "last" and parent else name
    label = f"{label} adapter" if label == BASE else label
    number = 2
    unique = label
    while unique in taken:
        unique, number = f"{label} ({number})", number + 1
    return unique


def recorded_data(adapters: Mapping[str, str]) -> dict[str, Any]:
    """What the adapters record of their data, as fields of `EvaluationSettings`: `prompts` and `exhaustive`, or none.

    Raises:
        UserError: They were trained with different ones.
    """
    known = {label: metadata for label, folder in adapters.items() if (metadata := read_metadata(folder)) is not None}
    complete = [metadata.data.get("exhaustive", True) for metadata in known.values()]
    recorded = {
        "prompts": [metadata.data.get("prompt_of_category") or {} for metadata in known.values()],
        "exhaustive": [tuple(names) if isinstance(names, list) else names for names in complete],
    }
    for name, values in recorded.items():
        if any(other != values[0] for other in values):
            raise UserError(
                f"the adapters {', '.join(known)} were trained with different data.{name}: measure them one at a time, "
                f"or give data.{name} for all in a --config"
            )
    return {name: values[0] for name, values in recorded.items() if values}


def ask_batches(
    make_worker: Callable[[], Any],
    batches: Batches,
    num_workers: int | None,
    device: Any,
    address: str | None,
) -> Iterator[tuple[Asked, dict[str, Any]]]:
    """The answers to each batch with the worker's facts: from this process, or from Ray workers in any order."""
    kind, _, number = (f"cuda:{device}" if str(device).isdecimal() else str(device)).partition(":")
    use_gpu = None if device is None else kind != "cpu"
    is_cluster = bool(address or os.environ.get("RAY_ADDRESS"))
    is_alone = not is_cluster and (use_gpu is False or bool(number) or _num_gpus_here() < 2)
    if num_workers == 0 or (num_workers is None and is_alone):
        worker = make_worker()
        for position in range(len(batches)):
            yield worker.ask(batches[position]), worker.facts()
        return
    if number:
        raise UserError(
            f"--device {device} names one GPU, and each of several Ray workers has its own: use --device cuda, or "
            "--num-workers 0"
        )
    from sam3lora.evaluation.ask.on_ray import ask_on_ray

    yield from ask_on_ray(make_worker, batches, num_workers=num_workers, use_gpu=use_gpu, address=address)


def _num_gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def progress_of(visible: bool, total: int, unit: str, note: str = "") -> Progress:
    """A bar on standard error while the work goes on; nothing in a log."""
    on_terminal = visible and sys.stderr.isatty()
    return Progress(total, unit, style="bar" if on_terminal else "off", note=note, stderr=True, transient=True)
