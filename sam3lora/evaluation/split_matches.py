"""One model's results on some images, matched to the ground truth: what the metrics need, without masks.

Shapes: `I` images, `C` categories.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sam3lora.config.evaluation import LOWEST_THRESHOLD
from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.cgf1_units import Units, collect_units
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory, annotations_of_record
from sam3lora.evaluation.metrics.matching import MatchTable, match_pairs
from sam3lora.evaluation.split_results import SplitResults, foreign_result

ABSENT, SHOWN, ONLY_CROWDS, UNKNOWN = range(4)
"""What an image shows of a category: nothing, an object, crowd regions alone, which say neither yes nor no, or what is
not known, because it has no label of a category that is not annotated exhaustively."""


@dataclass(frozen=True)
class SplitMatches:
    """Results of one model on some images, matched; it grows by some 40 bytes for each detection.

    Attributes:
        image_ids: In the order of all `I`.
        shown_IC: ABSENT, SHOWN, ONLY_CROWDS or UNKNOWN.
        presence_IC: Probability that the image shows the category; NaN where it was not asked.
        table: Matches for average precision.
        units: Units of cgF1.
        num_predictions, num_before_nms: Detections after and before suppression, merging and the limit.
        num_detections: Detections at or above the threshold of their category.
        num_without_mask: Objects that have only a box.
        incomplete: Columns of the categories that are not annotated exhaustively, from the `Matcher`.
    """

    image_ids: np.ndarray
    shown_IC: np.ndarray = field(repr=False)
    presence_IC: np.ndarray = field(repr=False)
    table: MatchTable = field(repr=False)
    units: Units = field(repr=False)
    num_predictions: int = 0
    num_before_nms: int = 0
    num_detections: int = 0
    num_without_mask: int = 0
    incomplete: tuple[int, ...] = ()

    @classmethod
    def join(cls, parts: Iterable[SplitMatches], image_ids: Sequence[int], num_categories: int) -> SplitMatches:
        """All parts as one, with the images in the order of `image_ids`, wherever they came from."""
        parts = list(parts)
        ids_I = np.asarray(image_ids, np.int64)
        by_id_I = np.argsort(ids_I, kind="stable")
        rows = [by_id_I[np.searchsorted(ids_I, part.image_ids, sorter=by_id_I)] for part in parts]
        shown_IC = np.zeros((len(ids_I), num_categories), np.int8)
        presence_IC = np.full(shown_IC.shape, np.nan)
        for part, rows_I in zip(parts, rows, strict=True):
            shown_IC[rows_I] = part.shown_IC
            presence_IC[rows_I] = part.presence_IC
        return cls(
            ids_I,
            shown_IC,
            presence_IC,
            MatchTable.join([part.table for part in parts], rows, ids_I, num_categories),
            Units.join([part.units for part in parts], rows, *shown_IC.shape),
            **{
                name: sum(getattr(part, name) for part in parts)
                for name in ("num_predictions", "num_before_nms", "num_detections", "num_without_mask")
            },
            incomplete=tuple(sorted({column for part in parts for column in part.incomplete})),
        )

    @property
    def complete_units(self) -> Units:
        """The units of the categories that are annotated exhaustively: only these say what a model found too much."""
        return self.units.without(self.incomplete) if self.incomplete else self.units

    def is_alarm_IC(self, thresholds: Mapping[int, float]) -> np.ndarray:
        """Pairs of image and absent category with a detection at the category's threshold."""
        return (self.shown_IC == ABSENT) & (self.table.best_score_IC >= np.array(list(thresholds.values())))


@dataclass(frozen=True)
class Matcher:
    """Matches results to the ground truth of the same images.

    Attributes:
        post: The post-processing of the results; its thresholds decide what counts as a detection.
        incomplete: Ids of the categories whose objects are not all annotated, from `incomplete_categories`. Of these,
            results count only in images with a labelled object.
    """

    categories: Sequence[PromptedCategory]
    post: PostProcessing
    incomplete: Set[int] = frozenset()

    @property
    def thresholds(self) -> dict[int, float]:
        """Category id -> lowest score that counts as a detection."""
        return {category.id: self.post.threshold_of(category.prompt) for category in self.categories}

    def match(self, records: Sequence[Mapping[str, Any]], results: SplitResults) -> SplitMatches:
        """Match the results of all images of these records of an index.

        Raises:
            UserError: A result belongs to another image or category.
        """
        columns = {category.id: column for column, category in enumerate(self.categories)}
        rows = {record["image_id"]: row for row, record in enumerate(records)}
        sizes_hw = [(record["height"], record["width"]) for record in records]
        annotations = [
            entry | {"image": row, "category": columns[entry["category_id"]]}
            for row, record in enumerate(records)
            for entry in annotations_of_record(record, self.categories)
        ]
        shown_IC = np.full((len(records), len(columns)), ABSENT, np.int8)
        for entry in annotations:
            is_object = not entry["iscrowd"] or entry["is_box_only"]
            pair = (entry["image"], entry["category"])
            shown_IC[pair] = SHOWN if is_object or shown_IC[pair] == SHOWN else ONLY_CROWDS
        incomplete = sorted(columns[id_] for id_ in self.incomplete)
        unclear_IC = np.zeros(shown_IC.shape, bool)
        unclear_IC[:, incomplete] = shown_IC[:, incomplete] != SHOWN
        shown_IC[unclear_IC & (shown_IC == ABSENT)] = UNKNOWN
        if unclear_IC.any():
            results = _left_out(results, rows, columns, unclear_IC)
        presence_IC = np.full(shown_IC.shape, np.nan)
        for (image_id, category_id), value in results.presence.items():
            presence_IC[rows[image_id], columns[category_id]] = value
        detections = _by_pair(results.predictions, rows, columns, sizes_hw)
        thresholds = self.thresholds
        units = collect_units(
            annotations,
            detections,
            shown_IC.shape,
            lowest_score=min([LOWEST_THRESHOLD, *thresholds.values()]),
        )
        return SplitMatches(
            np.array(list(rows), np.int64),
            shown_IC,
            presence_IC,
            match_pairs(sizes_hw, len(columns), annotations, detections),
            units,
            num_predictions=len(results.predictions),
            num_before_nms=results.num_before_nms,
            num_detections=sum(p["score"] >= thresholds[p["category_id"]] for p in results.predictions),
            num_without_mask=sum(entry["is_box_only"] for entry in annotations),
            incomplete=tuple(incomplete),
        )


def _left_out(
    results: SplitResults, rows: Mapping[int, int], columns: Mapping[int, int], unclear_IC: np.ndarray
) -> SplitResults:
    """The results without those of unclear pairs; a result of another split stays, and is refused where it is used."""

    def counts(image_id: int, category_id: int) -> bool:
        known = image_id in rows and category_id in columns
        return not known or not unclear_IC[rows[image_id], columns[category_id]]

    return dataclasses.replace(
        results,
        predictions=[p for p in results.predictions if counts(p["image_id"], p["category_id"])],
        presence={pair: value for pair, value in results.presence.items() if counts(*pair)},
    )


def _by_pair(
    predictions: Iterable[Mapping[str, Any]],
    rows: Mapping[int, int],
    columns: Mapping[int, int],
    sizes_hw: Sequence[tuple[int, int]],
) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    """(image, category) as positions -> detections by descending score."""
    found = defaultdict(list)
    for prediction in sorted(predictions, key=lambda entry: -entry["score"]):
        image_id, category_id = prediction["image_id"], prediction["category_id"]
        if image_id not in rows or category_id not in columns:
            raise UserError(foreign_result(prediction))
        found[rows[image_id], columns[category_id]].append(prediction)
    return found
