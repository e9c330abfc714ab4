"""`SplitMetrics`: all numbers of one model on one split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.fault_report import SplitFault, fault_lines
from sam3lora.evaluation.dense.class_counts import ClassCounts
from sam3lora.evaluation.metrics.cgf1 import SCORE_THRESHOLD
from sam3lora.evaluation.metrics.cgf1_units import count_units
from sam3lora.evaluation.metrics.coco_map import CocoAverages, average_table
from sam3lora.evaluation.metrics.curves import Curves, ThresholdSweep, evaluation_curves, sweep_thresholds
from sam3lora.evaluation.metrics.ground_truth import SplitTruth, incomplete_categories
from sam3lora.evaluation.metrics.semantic import SemanticMetrics
from sam3lora.evaluation.predictions import Predictions, encode_results
from sam3lora.evaluation.split_matches import ABSENT, SHOWN, Matcher, SplitMatches
from sam3lora.evaluation.split_results import SplitResults

PRESENCE_THRESHOLD = 0.5
IMAGES_AT_ONCE = 64  # whose results are matched together


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
    semantic_iou: float | None = None


# Fields of `SplitMetrics` that `to_dict` leaves out.
_NOT_NUMBERS = frozenset(("thresholds", "predictions", "matches", "truth", "curves", "sweep", "split_dir", "faults"))


@dataclass(frozen=True)
class SplitMetrics(CocoAverages):
    """Metrics of a model on a split: values in [0, 1], None where nothing can be measured (`notes` say why).

    Attributes:
        label: "base", or the name of the adapter.
        num_images, num_ground_truth: Number of evaluated images, and of objects in them.
        num_predictions, num_predictions_before_nms: Detections without a score cut, after and before suppression.
        num_detections: Detections at or above the threshold.
        per_category: Category name -> its metrics.
        cgf1, cgf1_50, cgf1_75, positive_micro_f1, il_mcc: As in SAM 3's evaluator, at score 0.5, over the categories
            that are annotated exhaustively; cgf1 and il_mcc are in [-1, 1]. If none of these has an object,
            positive_micro_f1 is that of the others.
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
        matches: What all was computed from, for intervals and rankings.
        predictions: The model's COCO results; None if they were not kept.
        truth: The ground truth.
        split_dir: Folder of the images.
        semantic_mean_iou, semantic_dice: Of the semantic output, see `SemanticMetrics`; None if it was not measured.
        faults: Of the split's annotation file, from `split_faults`, and the skipped images; `to_dict` adds them to the
            notes.
        skipped_images: Those that could not be read, which have no part in any number; from `SkippedImages.listed`.
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
    matches: SplitMatches = field(repr=False)
    predictions: Predictions | None = field(repr=False)
    truth: SplitTruth = field(repr=False)
    split_dir: Path | None = None
    seconds: float = 0.0
    faults: Sequence[SplitFault] = ()
    skipped_images: Sequence[Mapping[str, Any]] = ()
    semantic_mean_iou: float | None = None
    semantic_dice: float | None = None

    @property
    def threshold_text(self) -> str:
        """The thresholds in words, such as "0.50" or "0.50 (crack: 0.30)"."""
        common = self.settings["threshold"]
        names = {category.id: category.name for category in self.truth.categories}
        others = [f"{names[id_]}: {value:.2f}" for id_, value in self.thresholds.items() if value != common]
        return f"{common:.2f}" + (f" ({', '.join(others)})" if others else "")

    @property
    def is_alarm_IC(self) -> np.ndarray:
        """Pairs of image and absent category with a detection at the threshold."""
        return self.matches.is_alarm_IC(self.thresholds)

    def to_dict(self) -> dict[str, Any]:
        """The metrics as JSON values."""
        values = {name: value for name, value in vars(self).items() if name not in _NOT_NUMBERS}
        values["notes"] = [*fault_lines(self.faults), *self.notes]
        values["per_category"] = {name: asdict(entry) for name, entry in self.per_category.items()}
        if "semantic" not in self.settings:
            del values["semantic_mean_iou"], values["semantic_dice"]
            for entry in values["per_category"].values():
                del entry["semantic_iou"]
        values["threshold_sweep"] = None if self.sweep is None else self.sweep.to_dict()
        return values


def measure_split(
    truth: SplitTruth,
    results: SplitResults,
    *,
    label: str = "base",
    post: PostProcessing | None = None,
    exhaustive: bool | Sequence[str] = True,
    negative_prompts: Sequence[str] = (),
    num_queries: int | None = None,
    settings: Mapping[str, Any] | None = None,
    split_dir: Path | None = None,
    seconds: float = 0.0,
    notes: Sequence[str] = (),
    faults: Sequence[SplitFault] = (),
    skipped_images: Sequence[Mapping[str, Any]] = (),
) -> SplitMetrics:
    """Compute all metrics of one model on one split from results that are in memory.

    Args:
        results: The model's results on all images of the split.
        post: The post-processing of the results; None is the default. Its thresholds decide which detections count for
            `off_prompt_fpr`, tables and pictures. mAP has no threshold, and cgF1 its own (0.5).
        exhaustive, negative_prompts: See `incomplete_categories`. Of an incomplete category only images with a label
            are judged, and metrics that need absence leave it out; they are None if no category is complete.
        label, num_queries, settings, split_dir, seconds, notes, faults, skipped_images: See `measure_matches`.

    Raises:
        UserError: The results belong to other images or categories.
    """
    incomplete = incomplete_categories(truth.categories, exhaustive, negative_prompts)
    matcher = Matcher(truth.categories, post or PostProcessing(), incomplete)
    predictions = Predictions(truth.image_ids)
    parts = []
    for rows, part in results.split(truth.image_ids, IMAGES_AT_ONCE):
        parts.append(matcher.match([truth.index.record(row) for row in rows], part))
        predictions.add(encode_results(part.predictions, [truth.image_ids[row] for row in rows]))
    return measure_matches(
        truth,
        SplitMatches.join(parts, truth.image_ids, len(truth.categories)),
        matcher,
        label=label,
        predictions=predictions,
        num_queries=num_queries,
        settings=settings,
        split_dir=split_dir,
        seconds=seconds,
        notes=notes,
        faults=faults,
        skipped_images=skipped_images,
    )


def measure_matches(
    truth: SplitTruth,
    matches: SplitMatches,
    matcher: Matcher,
    *,
    label: str = "base",
    predictions: Predictions | None = None,
    num_queries: int | None = None,
    semantic: ClassCounts | None = None,
    settings: Mapping[str, Any] | None = None,
    split_dir: Path | None = None,
    seconds: float = 0.0,
    notes: Sequence[str] = (),
    faults: Sequence[SplitFault] = (),
    skipped_images: Sequence[Mapping[str, Any]] = (),
) -> SplitMetrics:
    """Compute all metrics of one model on one split.

    Args:
        matches: Of the model's results on all images of the split, by the matcher.
        label: Name of the model in tables.
        semantic: Pixels of the semantic output, if it was measured.
        num_queries: Number of the model's object queries, to warn of images that hold more objects.
        predictions, settings, split_dir, seconds, faults, skipped_images: Stored in the result.
        notes: What a reader should know of how it was asked; they come before those of the measuring.
    """
    post, incomplete = matcher.post, matcher.incomplete
    some_complete = len(incomplete) < len(truth.categories) or not incomplete
    found = average_table(matches.table, [category.name for category in truth.categories], num_queries=num_queries)
    thresholds = matcher.thresholds
    shown_IC, presence_IC = matches.shown_IC, matches.presence_IC
    is_absent_IC = shown_IC == ABSENT
    is_alarm_IC = matches.is_alarm_IC(thresholds)
    is_asked_IC = ~np.isnan(presence_IC)
    is_right_IC = (presence_IC > PRESENCE_THRESHOLD) == (shown_IC == SHOWN)
    counts = count_units(matches.complete_units)
    overall, of_categories = counts.overall(), counts.per_category()
    reason = overall.undefined_reason if some_complete else "absence is not annotated (data.exhaustive)"
    values = {} if reason else overall.metrics()
    positives = overall if overall.num_positives else count_units(matches.units).overall()
    sweep = sweep_thresholds(matches.complete_units, list(thresholds)) if some_complete else None
    num_ground_truth = sum(entry.num_ground_truth for entry in found.per_category.values())
    of_pixels = None if semantic is None else SemanticMetrics.of(semantic.total())
    per_category = {}
    for column, category in enumerate(truth.categories):
        entry, own = found.per_category[category.name], of_categories[column]
        curve = None if sweep is None else sweep.per_category.get(category.id)
        per_category[category.name] = CategoryMetrics(
            entry.map,
            entry.map_50,
            entry.map_75,
            entry.mar_100,
            entry.num_ground_truth,
            cgf1=None if own.undefined_reason else own.metrics()["cgF1"],
            off_prompt_fpr=_share(is_alarm_IC[:, column], is_absent_IC[:, column]),
            best_threshold=None if curve is None else curve.best_threshold,
            semantic_iou=None if of_pixels is None else of_pixels.per_category[column],
        )
    presence_accuracy = _share(is_right_IC, is_asked_IC & ((shown_IC == SHOWN) | is_absent_IC))
    num_absent = int(is_absent_IC.sum())
    all_notes = [*notes, *_notes(matches, num_ground_truth, presence_accuracy), *found.warnings]
    if incomplete:
        names = ", ".join(category.name for category in truth.categories if category.id in incomplete)
        all_notes.append(
            f"not annotated exhaustively (data.exhaustive): {names}. cgF1 and false alarms leave it out, and so does "
            "mAP in images without a label of it; elsewhere a detection of an object without a label counts as wrong"
        )
    if reason:
        all_notes.append(f"cgf1 and il_mcc are null: {reason}")
    if num_ground_truth and (
        no_such := [size for size in ("small", "medium", "large") if getattr(found, f"map_{size}") is None]
    ):
        all_notes.append(f"{', '.join(f'map_{size}' for size in no_such)} null: the split has no object of that size")
    if not matches.num_detections:
        all_notes.append(f"{label}: no detection reaches {post.threshold:g}; the lack of false alarms is no merit then")
    return SplitMetrics(
        label=label,
        num_images=len(matches.image_ids),
        num_ground_truth=num_ground_truth,
        num_predictions=matches.num_predictions,
        num_predictions_before_nms=matches.num_before_nms,
        num_detections=matches.num_detections,
        **found.averages(),
        per_category=per_category,
        cgf1=values.get("cgF1"),
        cgf1_50=values.get("cgF1@0.5"),
        cgf1_75=values.get("cgF1@0.75"),
        positive_micro_f1=positives.metrics()["positive_micro_F1"] if positives.num_positives else None,
        il_mcc=values.get("IL_MCC"),
        off_prompt_fpr=_share(is_alarm_IC, is_absent_IC),
        presence_accuracy=presence_accuracy,
        presence_accuracy_absent=_share(is_right_IC, is_asked_IC & is_absent_IC),
        num_absent_prompts=num_absent,
        settings={**post.model_dump(mode="json"), "cgf1_threshold": SCORE_THRESHOLD, **(settings or {})},
        notes=all_notes,
        thresholds=thresholds,
        sweep=sweep,
        curves=evaluation_curves(found, is_absent_IC),
        matches=matches,
        predictions=predictions,
        truth=truth,
        split_dir=split_dir,
        seconds=seconds,
        faults=faults,
        skipped_images=skipped_images,
        semantic_mean_iou=None if of_pixels is None else of_pixels.mean_iou,
        semantic_dice=None if of_pixels is None else of_pixels.mean_dice,
    )


def _share(is_so: np.ndarray, among: np.ndarray) -> float | None:
    """The share of those `among` that are so; None if there are none."""
    num = int(among.sum())
    return int((is_so & among).sum()) / num if num else None


def _notes(matches: SplitMatches, num_ground_truth: int, presence_accuracy: float | None) -> list[str]:
    notes = []
    if num_ground_truth == 0:
        notes.append("map is null: the split has no object with a mask")
    if presence_accuracy is None:
        notes.append("presence_accuracy is null: nothing could be asked, or the results carry no presence")
    if not (matches.shown_IC == ABSENT).any():
        known = (
            "absence is not annotated (data.exhaustive)" if matches.incomplete else "every image shows every category"
        )
        notes.append(f"off_prompt_fpr is null: {known}")
    if matches.num_without_mask:
        notes.append(
            f"{matches.num_without_mask} object(s) have a box and no mask: detections there count neither as right nor "
            "as wrong in mask mAP, and their images not in cgF1 of their category"
        )
    return notes
