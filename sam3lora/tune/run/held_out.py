"""The measurement of prompted adapters on a held-out split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sam3lora.config import Config
from sam3lora.data.split_files import SplitFiles
from sam3lora.evaluation.ask.run import evaluate_models
from sam3lora.evaluation.ask.worker import BASE, Models
from sam3lora.evaluation.metrics.bootstrap import Interval
from sam3lora.evaluation.metrics.comparison import differences_to_base
from sam3lora.evaluation.metrics.measure import SplitMetrics
from sam3lora.evaluation.skipped_images import check_same_images
from sam3lora.model.adapter.metadata import read_metadata
from sam3lora.training.validator import evaluation_settings

SHOWN = ("map", "map_50", "cgf1", "off_prompt_fpr")
PLAIN_MODEL, BASE_CONFIGURATION, BEST_TRIAL = "plain model", "base configuration", "best trial"
DEVICES = {"auto": None, True: "cuda", False: "cpu"}
"""The device that `scaling.use_gpu` stands for; None = a GPU where there is one."""


def measure_held_out(
    split: SplitFiles,
    base_adapter: Path | None,
    best_adapter: Path,
    config: Config,
    *,
    metric: str = "map",
    num_workers: int | None = 0,
    address: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Measure the plain model, the adapter of the base configuration and the best one on a split.

    Args:
        split: Images that had no part in the choice.
        base_adapter: Adapter folder of the base configuration; None compares the best with the plain model.
        best_adapter: Adapter folder of the best trial; it may be the same one.
        config: The base configuration, for thresholds, prompts and categories. All images are measured, whatever its
            `evaluation.num_samples` says.
        metric: The sweep's metric; for valid_loss, mAP is compared.
        num_workers: Ray workers; 0 measures in this process.
        address: Of a Ray cluster.
        changes: Fields of `EvaluationSettings` to change.

    Returns:
        JSON values: `split` (its name), `num_images`, `metric` (map or cgf1),
        `compared_with` ("base configuration" or "plain model"), the metric of that one as `base` and of the best trial
        as `best`, their `difference` with its 95 % paired bootstrap interval `low` to `high` (None where it cannot be
        measured), `note` for a special case in words, under `models` the metrics `SHOWN` of each, and the `faults` of
        the split's annotation file.

    Raises:
        UserError: The split is damaged, or an adapter does not belong to the model.
    """
    folders = {BEST_TRIAL: best_adapter}
    if base_adapter is not None and base_adapter.resolve() != best_adapter.resolve():
        folders = {BASE_CONFIGURATION: base_adapter, **folders}
    settings = evaluation_settings(config).changed(**({"num_samples": None} | changes))
    found: dict[str, SplitMetrics] = {}
    for models in _models(folders, config):
        of_models = evaluate_models(split, models, settings, num_workers=num_workers, address=address, progress=False)
        found |= zip(models.labels, of_models, strict=True)
    check_same_images(list(found.values()))
    found = {PLAIN_MODEL: found.pop(BASE), **found}
    if base_adapter is not None:
        found.setdefault(BASE_CONFIGURATION, found[BEST_TRIAL])
    reference = PLAIN_MODEL if base_adapter is None else BASE_CONFIGURATION
    metric = "map" if metric == "valid_loss" else metric
    best = found[BEST_TRIAL]
    return result_of(
        split,
        best,
        metric,
        {label: {name: getattr(one, name) for name in {*SHOWN, metric}} for label, one in found.items()},
        SHOWN,
        reference=reference,
        interval=differences_to_base(found[reference], [best])[best.label].get(metric),
        is_same=found[reference] is best,
    )


class Measured(Protocol):
    """What was measured of a model on a split."""

    @property
    def num_images(self) -> int: ...
    @property
    def faults(self) -> Sequence[Any]: ...


def result_of(
    split: SplitFiles,
    best: Measured,
    metric: str,
    values: Mapping[str, Mapping[str, Any]],
    shown: Sequence[str],
    *,
    reference: str,
    interval: Interval | None,
    is_same: bool,
) -> dict[str, Any]:
    """What `measure_held_out` returns.

    Args:
        values: Label of a model -> its metrics; without the `reference` nothing is compared.
        shown: The metrics of every model that are kept.
        interval: Of the best trial minus the reference.
        is_same: Whether the two are one model.
    """
    result = {
        "split": split.name,
        "num_images": best.num_images,
        "metric": metric,
        "compared_with": reference,
        "base": values[reference][metric] if reference in values else None,
        "best": values[BEST_TRIAL][metric],
        "difference": interval.difference if interval else None,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "models": {label: {name: of_model[name] for name in shown} for label, of_model in values.items()},
        "faults": list(best.faults),
    }
    if reference not in values:
        return result | {"note": f"The {reference} has no folder to compare with."}
    return result | {"note": _note(result, is_same=is_same)}


def model_options(config: Config) -> dict[str, Any]:
    """The base model of a configuration and its device, as evaluations take them."""
    return {
        "model": config.model.name,
        "revision": config.model.revision,
        "local_files_only": config.model.local_files_only,
        "device": DEVICES[config.scaling.use_gpu],
    }


def _models(folders: dict[str, Path], config: Config) -> list[Models]:
    """All models at once, or one group for each resolution that the adapters were trained at."""
    by_resolution: dict[int | None, dict[str, str]] = defaultdict(dict)
    for label, folder in folders.items():
        metadata = read_metadata(folder)
        resolution = config.model.resolution if metadata is None else metadata.resolution
        by_resolution[resolution][label] = str(folder)
    options = model_options(config)
    groups = by_resolution.items()
    return [
        Models(adapters, with_base=number == 0, options={**options, "resolution": resolution})
        for number, (resolution, adapters) in enumerate(groups)
    ]


def _note(result: dict[str, Any], *, is_same: bool) -> str:
    """A special case of a measurement in words."""
    if is_same:
        return "The base configuration is itself the best trial."
    if result["difference"] is None:
        return f"{result['metric']} cannot be measured on them."
    return "They are too few for an interval." if result["low"] is None else ""
