"""`SplitMetrics`: all numbers of one model on one split."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pycocotools.cocoeval import COCOeval

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.fault_report import SplitFault, fault_lines
from sam3lora.evaluation.metrics.cgf1 import SCORE_THRESHOLD, UnitCounts, accumulate
from sam3lora.evaluation.metrics.cgf1_units import SCORE_FLOOR, Units, count_units, split_units
from sam3lora.evaluation.metrics.coco_map import CocoAverages, coco_map
from sam3lora.evaluation.metrics.curves import Curves, ThresholdSweep, evaluation_curves, sweep_thresholds
from sam3lora.evaluation.metrics.ground_truth import PresenceTable, SplitTruth
from sam3lora.evaluation.split_results import Pair, SplitResults

PRESENCE_THRESHOLD = 0.5


@dataclass(frozen=True)
class CategoryMetrics:
    """Metrics of one category in [0, 1]; None without objects (mAP) or without images that lack it (false alarms)."""

    map: float | None
    map_50: float | None
    map_75: float | None
    mar_100: float | None
    num_ground_truth: int
    cgf1: float | None
    off_prompt_fpr: float | None
    best_threshold: float | None


# Fields of `SplitMetrics` that `to_dict` leaves out.
_NOT_NUMBERS = frozenset(
    (
        "thresholds",
        "predictions",
        "presence",
        "ground_truth",
        "units",
        "evaluation",
        "curves",
        "sweep",
        "split_dir",
        "faults",
    )
)


@dataclass(frozen=True)
class SplitMetrics(CocoAverages):
    """Metrics of a model on a split: values in [0, 1], None where nothing can be measured (`notes` say why).

    Attributes:
        label: "base", or the name of the adapter.
        num_images, num_ground_truth: Number of evaluated images, and of objects in them.
        num_predictions, num_predictions_before_nms: Detections without a score cut, after and before suppression.
        num_detections: Detections at or above the threshold.
        per_category: Category name -> its metrics.
        cgf1, cgf1_50, cgf1_75, positive_micro_f1, il_mcc: As in SAM 3's evaluator, at score 0.5; cgf1 and il_mcc are
            in [-1, 1].
        off_prompt_fpr: Share of (image, absent category) pairs with any detection at the threshold.
        presence_accuracy: Share of (image, category) pairs in which presence > 0.5 agrees with the annotations; pairs
            with crowd regions only are left out.
        presence_accuracy_absent: The same over absent categories alone.
        num_absent_prompts: Number of (image, absent category) pairs.
        notes: Reasons for missing metrics, and what else a reader should know.
        seconds: Wall-clock time of inference and measuring.
        thresholds: Category id -> lowest score that counts as a detection.
        sweep: cgF1 by threshold, overall and by category.
        curves: Precision by recall, and scores of right and wrong detections.
        units, evaluation: The matches behind cgF1 and mAP, for intervals.
        predictions, presence: The model's results.
        ground_truth: COCO dict that the predictions refer to, with masks as compressed RLE.
        split_dir: Folder of the images.
        faults: Of the split's annotation file, from `split_faults`; `to_dict` adds them to the notes.
    """

    label: str
    num_images: int
    num_ground_truth: int
    num_predictions: int
    num_predictions_before_nms: int
    num_detections: int
    per_category: dict[str, CategoryMetrics]
    cgf1: float | None
    cgf1_50: float | None
    cgf1_75: float | None
    positive_micro_f1: float | None
    il_mcc: float | None
    off_prompt_fpr: float | None
    presence_accuracy: float | None
    presence_accuracy_absent: float | None
    num_absent_prompts: int
    settings: dict[str, Any]
    notes: list[str]
    thresholds: dict[int, float] = field(repr=False)
    sweep: ThresholdSweep | None = field(repr=False)
    curves: Curves = field(repr=False)
    units: Units = field(repr=False)
    evaluation: COCOeval = field(repr=False)
    predictions: list[dict[str, Any]] = field(repr=False)
    presence: dict[Pair, float] = field(repr=False)
    ground_truth: dict[str, Any] = field(repr=False)
    split_dir: Path | None = None
    seconds: float = 0.0
    faults: Sequence[SplitFault] = ()

    @property
    def threshold_text(self) -> str:
        """The thresholds in words, such as "0.50" or "0.50 (crack: 0.30)"."""
        common = self.settings["threshold"]
        names = {category["id"]: category["name"] for category in self.ground_truth["categories"]}
        others = [f"{names[id_]}: {value:.2f}" for id_, value in self.thresholds.items() if value != common]
        return f"{common:.2f}" + (f" ({', '.join(others)})" if others else "")

    def to_dict(self) -> dict[str, Any]:
        """The metrics as JSON values."""
        values = {name: value for name, value in vars(self).items() if name not in _NOT_NUMBERS}
        values["notes"] = [*fault_lines(self.faults), *self.notes]
        values["per_category"] = {name: asdict(entry) for name, entry in self.per_category.items()}
        values["threshold_sweep"] = None if self.sweep is None else self.sweep.to_dict()
        return values


def measure_split(
    truth: SplitTruth,
    results: SplitResults,
    *,
    label: str = "base",
    post: PostProcessing | None = None,
    exhaustive: bool = True,
    num_queries: int | None = None,
    settings: Mapping[str, Any] | None = None,
    split_dir: Path | None = None,
    seconds: float = 0.0,
    faults: Sequence[SplitFault] = (),
) -> SplitMetrics:
    """Compute all metrics of one model on one split.

    Args:
        results: The model's results on all images of the split.
        label: Name of the model in tables.
        post: The post-processing of the results; None is the default. Its thresholds decide which detections count for
            `off_prompt_fpr`, tables and pictures. mAP has no threshold, and cgF1 its own (0.5).
        exhaustive: Whether a missing annotation means absence. Otherwise only pairs with annotations are judged, and
            metrics that need absence are None.
        num_queries: Number of the model's object queries, to warn of images that hold more objects.
        settings, split_dir, seconds, faults: Stored in the result.

    Raises:
        UserError: The results belong to other images or categories.
    """
    coco, presence = truth.coco, truth.presence
    post = post or PostProcessing()
    thresholds = {
        category["id"]: post.threshold_of(category.get("prompt", category["name"])) for category in coco["categories"]
    }
    if not exhaustive:
        known = {pair for pair, is_there in presence.items() if is_there}
        results = dataclasses.replace(
            results,
            predictions=[p for p in results.predictions if (p["image_id"], p["category_id"]) in known],
            presence={pair: value for pair, value in results.presence.items() if pair in known},
        )
    units = split_units(coco, results.predictions, presence, lowest_score=min([SCORE_FLOOR, *thresholds.values()]))
    found = coco_map(coco, results.predictions, num_queries=num_queries)
    alarms, absent = _false_alarms(coco, presence, results, thresholds)
    verdicts = {pair: value > PRESENCE_THRESHOLD for pair, value in results.presence.items()}
    right = [
        says == bool(presence.get(pair)) for pair, says in verdicts.items() if presence.get(pair, False) is not None
    ]
    right_absent = [not verdicts[pair] for pair in absent if pair in verdicts]
    counts: dict[int, list[UnitCounts]] = defaultdict(list)
    for (_, category_id), unit in count_units(units).items():
        counts[category_id].append(unit)
    overall = accumulate(unit for of_category in counts.values() for unit in of_category)
    reason = "absence is not annotated (data.exhaustive is false)" if not exhaustive else overall.undefined_reason
    values = {} if reason else overall.metrics()
    sweep = sweep_thresholds(units) if exhaustive else None
    num_ground_truth = sum(entry.num_ground_truth for entry in found.per_category.values())
    per_category = {}
    for category in coco["categories"]:
        entry, own = found.per_category[category["name"]], accumulate(counts[category["id"]])
        of_category = [pair for pair in absent if pair[1] == category["id"]]
        curve = None if sweep is None else sweep.per_category.get(category["id"])
        per_category[category["name"]] = CategoryMetrics(
            entry.map,
            entry.map_50,
            entry.map_75,
            entry.mar_100,
            entry.num_ground_truth,
            cgf1=None if own.undefined_reason or not exhaustive else own.metrics()["cgF1"],
            off_prompt_fpr=_share([pair in alarms for pair in of_category]) if exhaustive else None,
            best_threshold=None if curve is None else curve.best_threshold,
        )
    notes = [*_notes(truth, num_ground_truth, right, absent if exhaustive else None), *found.warnings]
    if reason:
        notes.append(f"cgf1 and il_mcc are null: {reason}")
    if num_ground_truth and (
        no_such := [size for size in ("small", "medium", "large") if getattr(found, f"map_{size}") is None]
    ):
        notes.append(f"{', '.join(f'map_{size}' for size in no_such)} null: the split has no object of that size")
    num_detections = sum(p["score"] >= thresholds[p["category_id"]] for p in results.predictions)
    if not num_detections:
        notes.append(f"{label}: no detection reaches {post.threshold:g}; the lack of false alarms is no merit then")
    return SplitMetrics(
        label=label,
        num_images=len(coco["images"]),
        num_ground_truth=num_ground_truth,
        num_predictions=len(results.predictions),
        num_predictions_before_nms=results.num_before_nms,
        num_detections=num_detections,
        **found.averages(),
        per_category=per_category,
        cgf1=values.get("cgF1"),
        cgf1_50=values.get("cgF1@0.5"),
        cgf1_75=values.get("cgF1@0.75"),
        positive_micro_f1=overall.metrics()["positive_micro_F1"] if overall.num_positives else None,
        il_mcc=values.get("IL_MCC"),
        off_prompt_fpr=_share([pair in alarms for pair in absent]) if exhaustive else None,
        presence_accuracy=_share(right),
        presence_accuracy_absent=_share(right_absent) if exhaustive else None,
        num_absent_prompts=len(absent) if exhaustive else 0,
        settings={**post.model_dump(mode="json"), "cgf1_threshold": SCORE_THRESHOLD, **(settings or {})},
        notes=notes,
        thresholds=thresholds,
        sweep=sweep,
        curves=evaluation_curves(found.evaluation),
        units=units,
        evaluation=found.evaluation,
        predictions=results.predictions,
        presence=results.presence,
        ground_truth=coco,
        split_dir=split_dir,
        seconds=seconds,
        faults=faults,
    )


def _false_alarms(
    coco: Mapping[str, Any], presence: PresenceTable, results: SplitResults, thresholds: Mapping[int, float]
) -> tuple[set[Pair], list[Pair]]:
    """(image, category) pairs with a detection, and the pairs whose category is absent from the image."""
    alarms = {
        (p["image_id"], p["category_id"]) for p in results.predictions if p["score"] >= thresholds[p["category_id"]]
    }
    pairs = [(image["id"], category["id"]) for image in coco["images"] for category in coco["categories"]]
    return alarms, [pair for pair in pairs if pair not in presence]


def _share(verdicts: Sequence[bool]) -> float | None:
    return sum(verdicts) / len(verdicts) if verdicts else None


def _notes(truth: SplitTruth, num_ground_truth: int, right: Sequence[bool], absent: Sequence[Pair] | None) -> list[str]:
    notes = []
    if num_ground_truth == 0:
        notes.append("map is null: the split has no object with a mask")
    if not right:
        notes.append("presence_accuracy is null: nothing could be asked, or the results carry no presence")
    if absent is None:
        notes.append("off_prompt_fpr is null: absence is not annotated (data.exhaustive is false)")
    elif not absent:
        notes.append("off_prompt_fpr is null: every image shows every category")
    if truth.num_without_mask:
        notes.append(
            f"{truth.num_without_mask} object(s) have a box and no mask: detections there count neither as right nor "
            "as wrong in mask mAP, and their images not in cgF1 of their category"
        )
    return notes
