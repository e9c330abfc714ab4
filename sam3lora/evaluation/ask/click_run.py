"""`evaluate_clicks`: from a data folder and a model to how many clicks its objects take."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from sam3lora.data.fault_report import faults_as_reason
from sam3lora.data.split_files import SplitFiles
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.click_worker import ClickWorker
from sam3lora.evaluation.ask.run import (
    RecordBatches,
    ask_batches,
    asked_categories,
    label_of,
    progress_of,
    read_split,
    recorded_data,
)
from sam3lora.evaluation.ask.worker import Models
from sam3lora.evaluation.clicks.measure import ClickMetrics, measure_clicks
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.evaluation.clicks.split_clicks import SplitClicks
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.skipped_images import SkippedImages
from sam3lora.local_paths import absolute_path
from sam3lora.model.adapter.metadata import current_versions


def evaluate_clicks(
    split: SplitFiles | Path,
    adapter: str | Path | None = None,
    settings: ClickEvaluation | None = None,
    *,
    click_adapter: str | Path | None = None,
    num_workers: int | None = 0,
    address: str | None = None,
    progress: bool = False,
    **options: Any,
) -> ClickMetrics:
    """Measure clicks on the objects of a COCO split, under an adapter or under the base.

    Args:
        split: A split, or its folder.
        adapter: Adapter folder; None measures the base.
        settings: None takes the prompts that the adapter records.
        click_adapter: Folder of task clicks, for the click head.
        num_workers: Ray workers; 0 measures in this process, None takes one for each GPU.
        address: Of a Ray cluster.
        options: `model`, `resolution`, `device`, `precision` and so on of `AdapterPool`.

    Raises:
        UserError: No such folder, a damaged file, an adapter of another base, or a base without a tracker.
        ImageError: An image cannot be read; with `settings.prompting.on_bad_image` "skip" none can be.
    """
    adapters = {} if adapter is None else {label_of(adapter): str(adapter)}
    settings = settings or ClickEvaluation(prompting=EvaluationSettings(**recorded_data(adapters)))
    models = Models(adapters, with_base=adapter is None, options=options)
    return evaluate_model_clicks(
        split,
        models,
        settings,
        click_adapter=click_adapter,
        num_workers=num_workers,
        address=address,
        progress=progress,
    )


def evaluate_model_clicks(
    split: SplitFiles | Path,
    models: Models,
    settings: ClickEvaluation,
    *,
    click_adapter: str | Path | None = None,
    num_workers: int | None = 0,
    address: str | None = None,
    progress: bool = False,
) -> ClickMetrics:
    """As `evaluate_clicks`, of `models`, which are one adapter or the base."""
    started = time.perf_counter()
    (label,) = models.labels
    if click_adapter is not None:
        models = _on_recorded_base(models, click_adapter)
        label, click_adapter = label_of(click_adapter), absolute_path(str(click_adapter))
    models = models.with_absolute_paths()
    if settings.clicks_vision == "base" and not models.adapters:
        raise UserError("without an adapter clicks see the trunk of the base anyway: leave clicks_vision out")
    split, index, faults = read_split(split, settings.prompting, tell=progress)
    skipped = SkippedImages(index, settings.prompting.num_samples)
    index = skipped.look_ahead(settings.prompting.on_bad_image, only_labelled=True)  # no other image is read
    # Nobody clicks on what no image shows.
    categories = asked_categories(index, replace(settings.prompting, negative_prompts=()))
    if not categories:
        raise UserError(
            f"{index.source}: no category has an object, so there is nothing to click on"
            + faults_as_reason(skipped.faults(split.title, faults))
        )
    make_worker = functools.partial(ClickWorker, models, categories, settings, click_adapter)
    clicks = SplitClicks.empty(settings.max_clicks)
    facts: dict[str, Any] = {}
    batches = RecordBatches(index, settings.prompting.batch_size)
    with progress_of(progress, len(index), "images", f"{settings.max_clicks} clicks an object") as bar:
        for asked, of_worker in ask_batches(make_worker, batches, num_workers, models.options.get("device"), address):
            facts = of_worker
            skipped.add(asked.skipped)
            of_batch = cast(SplitClicks, asked.answers)
            clicks.merge(of_batch)
            bar.advance(of_batch.counts["images"] + len(asked.skipped))
    skipped.check_some_read(len(clicks.alone.objects))
    return measure_clicks(
        clicks,
        skipped.readable(),
        [category.name for category in categories],
        label=label,
        start_from=settings.start_from,
        settings={
            "data": str(split),
            "adapter": next(iter(models.adapters.values()), None),
            "click_adapter": click_adapter,
            **facts,
            **settings.to_dict(),
            "versions": current_versions(),
        },
        seconds=time.perf_counter() - started,
        faults=skipped.faults(split.title, faults),
        skipped_images=skipped.listed(),
    )


def _on_recorded_base(models: Models, click_adapter: str | Path) -> Models:
    """The models on the base and at the resolution that a click adapter records, where nothing else says."""
    from sam3lora.model.clicks.adapter import read_click_metadata

    metadata, _ = read_click_metadata(click_adapter)
    options = {name: value for name, value in models.options.items() if value is not None}
    recorded: dict[str, Any] = {}
    if not models.adapters:
        if "model" not in options:
            recorded |= {"model": metadata.base_model, "revision": metadata.base_revision}
        recorded["resolution"] = metadata.resolution
    return replace(models, options=recorded | options)
