"""Decoding of one record: pixels in the model's frame, queries and packed targets. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sam3lora.data.annotations import MIN_BOX_AREA
from sam3lora.data.array_store import ArrayStore, digest, image_digest
from sam3lora.data.augment import Augmentation, Placement, choose_placement, place_image
from sam3lora.data.bad_images import SkippedImage
from sam3lora.data.batch import Batch
from sam3lora.data.coco import read_record
from sam3lora.data.images import ImageError, read_image
from sam3lora.data.index_columns import object_columns
from sam3lora.data.label_maps import LabelMaps
from sam3lora.data.masks import place_mask
from sam3lora.data.prompts import Query, build_queries, sample_rng

_QUERY_STREAM, _PLACEMENT_STREAM, _SUBSET_STREAM = range(3)
_FRAME_VERSION = 1  # raise it when decoding or resizing gives other pixels


@dataclass(frozen=True)
class DecodeSettings:
    """Everything that decides how records are decoded; plain values, so that it can be sent to data tasks.

    Args:
        names: Category names of the data set (`CocoIndex.names`, or `merge_names` of its splits).
        resolution: Side S of the model's square input in pixels.
        mask_size: Side M of the target masks, which cover the whole frame; None for boxes only.
        augmentation, horizontal_flip, vertical_flip: See `choose_placement`.
        prompts_map, negative_prompts, num_negatives, exhaustive: See `build_queries`.
        max_objects: A query with more objects keeps a random subset of this size; None keeps all.
        max_per_image: The same for an image, over all of its queries.
        on_bad_image: "stop" raises, "skip" leaves the image out and lists it.
        seed: Seed of negatives, placement and subsets.
        store: Where features and frames are kept; None for nowhere.
        features: Identity of the features that are kept (`TrunkCache.identity`); None where none are. An image whose
            features the store has is not decoded.
        keep_frames: Keep decoded frames in the store. Both need frames that no augmentation changes.
        label_maps: Nothing is asked; each image gets label maps of side `mask_size`.
    """

    names: tuple[str, ...]
    resolution: int = 1008
    mask_size: int | None = 1008
    augmentation: Augmentation = "none"
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    prompts_map: Mapping[str, str] = field(default_factory=dict)
    negative_prompts: tuple[str, ...] = ()
    num_negatives: int | None = None
    exhaustive: bool | tuple[str, ...] = True
    max_objects: int | None = None
    max_per_image: int | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"
    seed: int = 0
    store: ArrayStore | None = None
    features: str | None = None
    keep_frames: bool = False
    label_maps: LabelMaps | None = None

    @property
    def is_augmented(self) -> bool:
        return self.augmentation != "none" or self.horizontal_flip > 0 or self.vertical_flip > 0


def record_queries(record: Mapping[str, Any], settings: DecodeSettings, epoch: int = 0) -> list[Query]:
    """The queries that `decode_record` asks of a record in an epoch; needs no image."""
    return build_queries(
        record,
        settings.names,
        rng=sample_rng(settings.seed, epoch, record["image_id"], _QUERY_STREAM),
        prompts_map=settings.prompts_map,
        negative_prompts=settings.negative_prompts,
        num_negatives=settings.num_negatives,
        exhaustive=settings.exhaustive,
    )


def rows_with_queries(table: pa.Table, settings: DecodeSettings) -> list[int]:
    """Positions of the images with at least one query; only these are trained on.

    The others show, for example, only crowd regions of the only category, or no objects while absence is not known
    (no `exhaustive` category and no list of negatives). The result is the same in every epoch.
    """
    objects = object_columns(table)
    has_query_I = objects.count_per_image(~objects.crowd_T) > 0  # every object is asked for
    is_empty_I = objects.count_per_image() == 0
    has_query_I |= is_empty_I & bool(record_queries({"image_id": 0, "annotations": []}, settings))
    for row in np.flatnonzero(~has_query_I & ~is_empty_I).tolist():  # only crowd regions
        has_query_I[row] = bool(record_queries(read_record(table, row), settings))
    return np.flatnonzero(has_query_I).tolist()


def decode_record(record: Mapping[str, Any], settings: DecodeSettings, epoch: int = 0) -> Batch:
    """A batch of one record: its pixels, queries and targets in an epoch, reproducible from (seed, epoch, image id).

    The batch carries no pixels where the store has the image's features. A bad image gives a batch of no image that
    lists it as skipped, with `on_bad_image` "skip".

    Raises:
        ImageError: The image cannot be read and `on_bad_image` is "stop".
    """
    placement = Placement()
    if settings.is_augmented:
        placement = choose_placement(
            settings.resolution,
            sample_rng(settings.seed, epoch, record["image_id"], _PLACEMENT_STREAM),
            augmentation=settings.augmentation,
            horizontal_flip=settings.horizontal_flip,
            vertical_flip=settings.vertical_flip,
        )
    side, size_hw = settings.resolution, _size_hw(record)
    images = np.zeros((0, side, side, 3), dtype=np.uint8)
    skipped = []
    key = feature_key(record, settings)
    if key is None or settings.store is None or key not in settings.store:
        try:
            frame, size_hw = read_frame(record, settings, placement)
            images = frame[None]
        except ImageError as error:
            if settings.on_bad_image == "stop":
                raise ImageError(f"{error}. Repair or remove it, or set training.on_bad_image=skip") from None
            skipped = [SkippedImage.of(record, error)]
    kept = 1 - len(skipped)  # images of the batch: 1 or 0
    queries = record_queries(record, settings, epoch) if kept and settings.label_maps is None else []
    subset_rng = sample_rng(settings.seed, epoch, record["image_id"], _SUBSET_STREAM)
    asked = matched_objects(record, queries, settings.max_objects, subset_rng)
    if settings.max_per_image is not None:
        asked = _at_most(asked, settings.max_per_image, subset_rng)
    objects = [record["annotations"][row] for _, rows in asked for row in rows]
    masks_packed, mask_valid_T = _draw_masks(objects, _size_hw(record), placement, settings.mask_size)
    return Batch(
        images_NHWC=images,
        image_rows_N=np.arange(len(images)),
        feature_keys_I=[key] * kept,
        image_ids=np.array([record["image_id"]] * kept, dtype=np.int64),
        paths=[record["path"]] * kept,
        original_sizes_hw=np.array([size_hw] * kept, dtype=np.int64).reshape(-1, 2),
        query_image_B=np.zeros(len(asked), dtype=np.int64),
        prompts_B=[query.prompt for query, _ in asked],
        num_B=np.array([len(rows) for _, rows in asked], dtype=np.int64),
        exhaustive_B=np.array([query.is_exhaustive for query, _ in asked], dtype=bool),
        boxes_cxcywh_T4=_place_boxes([item["bbox_xywh"] for item in objects], _size_hw(record), placement),
        masks_packed=masks_packed,
        mask_size=settings.mask_size,
        mask_valid_T=mask_valid_T,
        skipped=skipped,
        label_maps=_label_maps(record, settings, placement, kept),
    )


def _label_maps(
    record: Mapping[str, Any], settings: DecodeSettings, placement: Placement, kept: int
) -> np.ndarray | None:
    """(kept, N, M, M): of the one image, or of none."""
    if settings.label_maps is None:
        return None
    assert settings.mask_size is not None, "label maps have a size"
    side = settings.mask_size
    if not kept:
        return np.zeros((0, settings.label_maps.num_maps, side, side), dtype=np.uint8)
    return settings.label_maps.placed(record, placement, side)[None]


def feature_key(record: Mapping[str, Any], settings: DecodeSettings) -> str | None:
    """Where the store keeps a record's features; None if they are not kept, or the file cannot be read."""
    if settings.features is None:
        return None
    frame = _frame_key(record, settings)
    return None if frame is None else digest("features", frame, settings.features)


def read_frame(
    record: Mapping[str, Any], settings: DecodeSettings, placement: Placement | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Frame uint8 (S, S, 3) and size (height, width) of the decoded image, from the store where frames are kept.

    Raises:
        ImageError: The image cannot be read.
    """
    size_hw, side = _size_hw(record), settings.resolution
    key = _frame_key(record, settings) if settings.keep_frames else None
    if key is not None and settings.store is not None:
        kept = settings.store.get(key)
        if kept is not None and kept.dtype == np.uint8 and kept.shape == (side, side, 3):
            return kept, size_hw
    image = read_image(record["path"], expected_size_hw=size_hw)
    frame = place_image(image, placement or Placement(), side)
    if key is not None and settings.store is not None:
        settings.store.put(key, frame)
    return frame, (image.shape[0], image.shape[1])


def _frame_key(record: Mapping[str, Any], settings: DecodeSettings) -> str | None:
    """Key of the decoded frame, from the file's content and the decoding settings; None if it cannot be read."""
    if settings.store is None or settings.is_augmented:
        return None
    try:
        content = image_digest(settings.store, record["path"])
    except OSError:  # decoding reports the reason
        return None
    return digest("frame", content, record["height"], record["width"], settings.resolution, _FRAME_VERSION)


def matched_objects(
    record: Mapping[str, Any], queries: Sequence[Query], max_objects: int | None, rng: np.random.Generator
) -> list[tuple[Query, list[int]]]:
    """The queries that have a loss, each with the positions of its objects among the record's annotations.

    A present category whose objects all lack area is left out: nothing of it can be matched, so it is neither positive
    nor negative. Of a query with more than `max_objects` objects `rng` draws a subset, and of a subset, or of objects
    some of which lack area, the query is no longer exhaustive.
    """
    annotations, size_hw = record["annotations"], _size_hw(record)
    found = []
    for query in queries:
        rows = [row for row in query.annotation_rows if _has_area(annotations[row]["bbox_xywh"], size_hw)]
        if query.is_positive and not rows:
            continue
        if max_objects is not None and len(rows) > max_objects:
            chosen = rng.choice(len(rows), size=max_objects, replace=False)
            rows = [rows[i] for i in sorted(chosen)]
        if len(rows) < len(query.annotation_rows):
            query = replace(query, is_exhaustive=False)
        found.append((query, rows))
    return found


def _at_most(asked: list[tuple[Query, list[int]]], num: int, rng: np.random.Generator) -> list[tuple[Query, list[int]]]:
    """A random subset of `num` objects of all queries; a query that loses some is no longer exhaustive, or goes."""
    total = sum(len(rows) for _, rows in asked)
    if total <= num:
        return asked
    kept = np.zeros(total, dtype=bool)
    kept[rng.choice(total, size=num, replace=False)] = True
    still, found = iter(kept.tolist()), []
    for query, rows in asked:
        rows_left = [row for row in rows if next(still)]
        if len(rows_left) == len(rows):
            found.append((query, rows))
        elif rows_left:
            found.append((replace(query, is_exhaustive=False), rows_left))
    return found


def _size_hw(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["height"], record["width"]


def _has_area(box_xywh: Sequence[float], size_hw: tuple[int, int]) -> bool:
    return box_xywh[2] * box_xywh[3] >= MIN_BOX_AREA * size_hw[0] * size_hw[1]


def _place_boxes(boxes_xywh: list[list[float]], size_hw: tuple[int, int], placement: Placement) -> np.ndarray:
    """Pixel xywh -> float32 (T, 4) cxcywh relative to the frame."""
    xywh = np.array(boxes_xywh, dtype=np.float64).reshape(-1, 4)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    height, width = size_hw
    placed = placement.map_boxes(np.clip(xyxy / (width, height, width, height), 0.0, 1.0))
    low, high = placed[:, :2], placed[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)


def _draw_masks(
    annotations: list[Mapping[str, Any]], size_hw: tuple[int, int], placement: Placement, mask_size: int | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """Packed masks and which of them count: an object without a mask, or too thin to leave a pixel, does not."""
    valid = np.zeros(len(annotations), dtype=bool)
    if mask_size is None:
        return None, valid
    packed = np.zeros((len(annotations), -(-mask_size * mask_size // 8)), dtype=np.uint8)
    for i, annotation in enumerate(annotations):
        mask = place_mask(annotation["segmentation"], size_hw, placement, mask_size)
        if mask is not None and mask.any():
            packed[i] = np.packbits(mask)
            valid[i] = True
    return packed, valid
