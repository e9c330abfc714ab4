"""Detections matched to objects, image by image, as COCO's evaluation does: what average precision is computed from.

Matching needs the masks of one image at a time. What it leaves has a few bytes for each detection, so it is done where
the masks are, and the results of many workers are joined.

Shapes: `I` images, `C` categories, `D` detections, `K` comparisons, `T` the ten IoU thresholds 0.50, 0.55 ... 0.95.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import hotcoco
import numpy as np
from pycocotools import mask as coco_mask

from sam3lora.data.coco_limits import MAX_DETECTIONS, SIZE_LIMITS

NUM_THRESHOLDS = 10
IOU_50, IOU_75 = 0, 5  # positions in the thresholds

_SMALL_TO_MEDIUM, _MEDIUM_TO_LARGE, _WITHOUT_LIMIT = (*map(float, SIZE_LIMITS), 1e10)
AREAS = {
    "all": (0.0, _WITHOUT_LIMIT),
    "small": (0.0, _SMALL_TO_MEDIUM),
    "medium": (_SMALL_TO_MEDIUM, _MEDIUM_TO_LARGE),
    "large": (_MEDIUM_TO_LARGE, _WITHOUT_LIMIT),
}
"""Sizes of objects in pixels, as COCO bounds them: a detection outside of them counts only if its object is inside."""

NUM_COMPARISONS = 5
MASKS, SMALL_MASKS, MEDIUM_MASKS, LARGE_MASKS, BOXES = range(NUM_COMPARISONS)
"""The comparisons: masks of objects of all sizes, small, medium and large ones; boxes of all sizes."""

_AREAS_OF: dict[Literal["segm", "bbox"], list[str]] = {"segm": list(AREAS), "bbox": ["all"]}


@dataclass(frozen=True)
class MatchTable:
    """One row for each detection that average precision looks at: the best `MAX_DETECTIONS` of a pair of image and
    category, by descending score.

    Attributes:
        image_D, category_D: int32, positions in the lists of images and of categories. Rows of a pair follow each
            other. In a joined table pairs are in ascending order of image ids, which decides between equal scores.
        score_D: float64.
        matched_DK: uint16, bit t: an object or a crowd region was matched at IoU threshold t.
        ignored_DK: uint16, bit t: it counts as neither right nor wrong at IoU threshold t.
        num_objects_KIC: int32, number of objects to be found, without crowd regions.
        is_annotated_IC: Whether the image has an object or a crowd region of the category.
    """

    image_D: np.ndarray
    category_D: np.ndarray
    score_D: np.ndarray
    matched_DK: np.ndarray
    ignored_DK: np.ndarray
    num_objects_KIC: np.ndarray
    is_annotated_IC: np.ndarray

    @classmethod
    def join(
        cls, tables: Sequence[MatchTable], rows: Sequence[np.ndarray], ids_I: np.ndarray, num_categories: int
    ) -> MatchTable:
        """One table of the images with these ids; `rows` are, for each table, the positions of its images in them."""
        num_objects_KIC = np.zeros((NUM_COMPARISONS, len(ids_I), num_categories), np.int32)
        is_annotated_IC = np.zeros((len(ids_I), num_categories), bool)
        for table, rows_I in zip(tables, rows, strict=True):
            num_objects_KIC[:, rows_I] = table.num_objects_KIC
            is_annotated_IC[rows_I] = table.is_annotated_IC
        image_D = _concatenate([rows_I[t.image_D] for t, rows_I in zip(tables, rows, strict=True)], np.int32)
        rank_I = np.empty(len(ids_I), np.int32)
        rank_I[np.argsort(ids_I, kind="stable")] = np.arange(len(ids_I))
        rank_D = rank_I[image_D]
        order_D = slice(None) if (rank_D[1:] >= rank_D[:-1]).all() else np.argsort(rank_D, kind="stable")
        flags_shape = (NUM_COMPARISONS,)
        return cls(
            image_D[order_D],
            _concatenate([table.category_D for table in tables], np.int32)[order_D],
            _concatenate([table.score_D for table in tables], np.float64)[order_D],
            _concatenate([table.matched_DK for table in tables], np.uint16, flags_shape)[order_D],
            _concatenate([table.ignored_DK for table in tables], np.uint16, flags_shape)[order_D],
            num_objects_KIC,
            is_annotated_IC,
        )

    @property
    def num_categories(self) -> int:
        return self.is_annotated_IC.shape[1]

    @cached_property
    def best_score_IC(self) -> np.ndarray:
        """The highest score of each pair, minus infinity without a detection."""
        best_IC = np.full(self.is_annotated_IC.shape, -np.inf)
        np.maximum.at(best_IC, (self.image_D, self.category_D), self.score_D)
        return best_IC

    @cached_property
    def rows_of_category(self) -> list[np.ndarray]:
        """For each category its rows, in the order of the table."""
        by_category_D = np.argsort(self.category_D, kind="stable")
        ends = np.cumsum(np.bincount(self.category_D, minlength=self.num_categories))
        return np.split(by_category_D, ends[:-1]) if self.num_categories else []


def _concatenate(arrays: Sequence[np.ndarray], dtype: Any, shape: tuple[int, ...] = ()) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty((0, *shape), dtype)


def match_pairs(
    sizes_hw: Sequence[tuple[int, int]],
    num_categories: int,
    annotations: Iterable[Mapping[str, Any]],
    detections: Mapping[tuple[int, int], Sequence[Mapping[str, Any]]],
    *,
    boxes: bool = True,
) -> MatchTable:
    """Match the detections of some images, as pycocotools' `COCOeval.evaluate` does; hotcoco does the work.

    Args:
        sizes_hw: Of each image.
        annotations: With `image` and `category` (positions), `segmentation` (compressed RLE at the image's size),
            `area` of the mask, `iscrowd`, and `bbox` (xywh, else the mask's). A crowd region marked `is_box_only` is an
            object for boxes.
        detections: (image, category) as positions -> COCO results by descending score.
        boxes: Compare boxes too; without, that comparison has no object.

    Raises:
        ValueError: The mask of a detection has another size than its image.
    """
    annotations = list(annotations)
    kept = {pair: of_pair[:MAX_DETECTIONS] for pair, of_pair in detections.items() if of_pair}
    for (image, _), of_pair in kept.items():
        _check_sizes(of_pair, sizes_hw[image])
    rows = list(itertools.chain.from_iterable(kept.values()))
    counts = [len(of_pair) for of_pair in kept.values()]
    first_row = dict(zip(kept, np.cumsum([0, *counts]), strict=False))
    pair_N2 = np.array(list(kept), np.int32).reshape(-1, 2)
    # One by one: pycocotools takes no list of more than 255 masks.
    area_D = np.array([coco_mask.area(row["segmentation"]) for row in rows], float)
    matched_DK = np.zeros((len(rows), NUM_COMPARISONS), np.uint16)
    ignored_DK = np.zeros_like(matched_DK)
    for k, (low, high) in enumerate(AREAS.values()):
        ignored_DK[(area_D < low) | (area_D > high), k] = _ALL_BITS
    num_objects_KIC = np.zeros((NUM_COMPARISONS, len(sizes_hw), num_categories), np.int32)

    # Where nothing is annotated, no detection is matched: most pairs need no further work.
    annotated = {(annotation["image"], annotation["category"]) for annotation in annotations}
    results = [
        _entry(pair, row, area_D[row], {**rows[row], "iscrowd": 0})
        for pair in annotated & kept.keys()
        for row in range(first_row[pair], first_row[pair] + len(kept[pair]))
    ]
    for iou_type in ("segm", "bbox") if boxes else ("segm",):
        truth = [
            _entry((entry["image"], entry["category"]), number, entry["area"], _as_compared(entry, iou_type))
            for number, entry in enumerate(annotations)
        ]
        first_k = MASKS if iou_type == "segm" else BOXES
        for unit in _evaluate(sizes_hw, num_categories, truth, results, iou_type):
            k = first_k + unit["area"]
            num_objects_KIC[k, unit["image_id"] - 1, unit["category_id"] - 1] = unit["gtIgnore"].count(False)
            if unit["dtIds"]:
                at = np.array(unit["dtIds"]) - 1
                matched_DK[at, k] = _bits(unit["dtMatched"])
                ignored_DK[at, k] = _bits(unit["dtIgnore"])
    image_D, category_D = pair_N2.repeat(counts, axis=0).T
    score_D = np.array([row["score"] for row in rows], float)
    is_annotated_IC = np.zeros((len(sizes_hw), num_categories), bool)
    for image, category in annotated:
        is_annotated_IC[image, category] = True
    return MatchTable(image_D, category_D, score_D, matched_DK, ignored_DK, num_objects_KIC, is_annotated_IC)


def _check_sizes(of_pair: Sequence[Mapping[str, Any]], expected: tuple[int, int]) -> None:
    """Masks of unequal size overlap in no pixel, which would read as a miss."""
    for size in {tuple(detection["segmentation"]["size"]) for detection in of_pair}:
        if size != tuple(expected):
            raise ValueError(
                f"a prediction of image {of_pair[0]['image_id']!r} has a mask of (height, width) {size}, "
                f"expected the image's size {tuple(expected)}"
            )


_BIT_T = (1 << np.arange(NUM_THRESHOLDS)).astype(np.uint16)
_ALL_BITS = np.uint16(_BIT_T.sum())


def _bits(flags_TD: Sequence[Sequence[bool]]) -> np.ndarray:
    """Bits (D,) of flags at each threshold."""
    return (_BIT_T[:, None] * np.array(flags_TD, bool)).sum(axis=0, dtype=np.uint16)


def flags_of(bits_D: np.ndarray) -> np.ndarray:
    """Flags (T, D) of bits, the inverse of how `MatchTable` keeps them."""
    return (bits_D[None, :] & _BIT_T[:, None]) > 0


def _entry(pair: tuple[int, int], number: int, area: float, region: Mapping[str, Any]) -> dict[str, Any]:
    """An annotation for hotcoco. Ids count from 1, because an id of 0 would read as no match."""
    return {
        "id": number + 1,
        "image_id": pair[0] + 1,
        "category_id": pair[1] + 1,
        "segmentation": region["segmentation"],
        "area": float(area),
        "bbox": [float(value) for value in region.get("bbox") or coco_mask.toBbox(region["segmentation"])],
        "iscrowd": region["iscrowd"],
    } | ({"score": region["score"]} if "score" in region else {})


def _as_compared(annotation: Mapping[str, Any], iou_type: str) -> Mapping[str, Any]:
    return {**annotation, "iscrowd": 0} if iou_type == "bbox" and annotation.get("is_box_only") else annotation


def _evaluate(
    sizes_hw: Sequence[tuple[int, int]],
    num_categories: int,
    truth: list[dict[str, Any]],
    results: list[dict[str, Any]],
    iou_type: Literal["segm", "bbox"],
) -> Iterable[dict[str, Any]]:
    """`evalImgs` of the pairs with annotations, with the position of its size as `area`."""
    if not truth:
        return
    images = [{"id": row + 1, "height": height, "width": width} for row, (height, width) in enumerate(sizes_hw)]
    categories = [{"id": column + 1, "name": str(column)} for column in range(num_categories)]
    lists = {"images": images, "categories": categories}
    evaluation = hotcoco.COCOeval(
        hotcoco.COCO(lists | {"annotations": truth}), hotcoco.COCO(lists | {"annotations": results}), iou_type
    )
    names = _AREAS_OF[iou_type]
    evaluation.params.max_dets = [MAX_DETECTIONS]
    evaluation.params.area_rng = [list(AREAS[name]) for name in names]
    evaluation.params.area_rng_lbl = names
    evaluation.evaluate()
    position = {AREAS[name]: number for number, name in enumerate(names)}
    for unit in evaluation.eval_imgs:
        if unit is not None:
            yield unit | {"area": position[tuple(unit["aRng"])]}
