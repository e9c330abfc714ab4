"""One record to a decoded sample: pixels in the model's frame, queries, packed targets. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sam3lora.data.annotations import MIN_BOX_AREA
from sam3lora.data.array_store import ArrayStore, digest, image_digest
from sam3lora.data.augment import Augmentation, Placement, choose_placement, place_image
from sam3lora.data.images import ImageError, read_image
from sam3lora.data.masks import place_mask
from sam3lora.data.prompts import Query, build_queries, sample_rng

_QUERY_STREAM, _PLACEMENT_STREAM, _SUBSET_STREAM = range(3)
_FRAME_VERSION = 1  # of decoding and resizing: another number where they give other pixels


@dataclass(frozen=True)
class DecodeSettings:
    """Everything that decides how records become samples; plain values, so that it travels to data workers.

    Args:
        names: Category names of the data set (`CocoIndex.names`, or `merge_names` of its splits).
        resolution: Side S of the model's square input in pixels.
        mask_size: Side M of the target masks, which cover the whole frame; None for boxes only.
        augmentation: "none" or "sam3" (`augment`).
        horizontal_flip: Probability of mirroring.
        prompts_map: Category name -> prompt text.
        negative_prompts: The user's own negatives.
        num_negatives: Sampled absent categories an image; None or -1 for all.
        exhaustive: Whether a missing annotation means absence.
        max_objects: A query with more objects keeps a random subset of this size; None keeps all.
        on_bad_image: "stop" raises, "skip" leaves the image out and lists it.
        seed: Seed of negatives, placement and subsets.
        store: Where features and frames are kept; None for nowhere.
        features: What makes the features of a frame; an image whose features the store has is not decoded. None where
            features are not kept.
        keep_frames: Keep decoded frames in the store. Both need frames that no augmentation changes.
    """

    names: tuple[str, ...]
    resolution: int = 1008
    mask_size: int | None = 1008
    augmentation: Augmentation = "none"
    horizontal_flip: float = 0.0
    prompts_map: Mapping[str, str] = field(default_factory=dict)
    negative_prompts: tuple[str, ...] = ()
    num_negatives: int | None = None
    exhaustive: bool = True
    max_objects: int | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"
    seed: int = 0
    store: ArrayStore | None = None
    features: str | None = None
    keep_frames: bool = False

    @property
    def is_augmented(self) -> bool:
        return self.augmentation != "none" or self.horizontal_flip > 0


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
    """Positions of the images that anything can be asked of: what to plan over.

    The others show only crowd regions of the only category, say, or lack objects while absence is not known
    (`exhaustive` False and no list of negatives). The answer is the same in every epoch.
    """
    return [row for row, record in enumerate(table.to_pylist()) if record_queries(record, settings)]


def decode_record(record: Mapping[str, Any], settings: DecodeSettings, epoch: int = 0) -> dict[str, Any] | ImageError:
    """Queries, placement and pixels of one record in one epoch, reproducible from (seed, epoch, image id).

    Returns:
        `image` uint8 (S, S, 3), or None where the store has the features; `feature_key`, under which it has them or is
        to get them, or None; `image_id`, `path`, `original_size_hw` (of the decoded image, as annotated without
        pixels), `placement`; and the targets of `place_targets`. Or, with `on_bad_image` "skip", the error that a bad
        image raised.

    Raises:
        ImageError: The image cannot be read and `on_bad_image` is "stop".
    """
    queries = record_queries(record, settings, epoch)
    placement = Placement()
    if settings.is_augmented:
        placement = choose_placement(
            settings.resolution,
            sample_rng(settings.seed, epoch, record["image_id"], _PLACEMENT_STREAM),
            augmentation=settings.augmentation,
            horizontal_flip=settings.horizontal_flip,
        )
    key = feature_key(record, settings)
    image, original_size_hw = None, (record["height"], record["width"])
    if key is None or settings.store is None or key not in settings.store:
        try:
            image, original_size_hw = read_frame(record, settings, placement)
        except ImageError as error:
            if settings.on_bad_image == "stop":
                raise
            return error
    return {
        "image": image,
        "feature_key": key,
        "image_id": record["image_id"],
        "path": record["path"],
        "original_size_hw": original_size_hw,
        "placement": placement,
        **place_targets(
            record,
            queries,
            mask_size=settings.mask_size,
            placement=placement,
            max_objects=settings.max_objects,
            rng=sample_rng(settings.seed, epoch, record["image_id"], _SUBSET_STREAM),
        ),
    }


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
    size_hw = (record["height"], record["width"])
    side = settings.resolution
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
    """Of the file's content and what decides how it is decoded and resized; None if it cannot be read."""
    if settings.store is None or settings.is_augmented:
        return None
    try:
        content = image_digest(settings.store, record["path"])
    except OSError:  # what is wrong with it, decoding says
        return None
    return digest("frame", content, record["height"], record["width"], settings.resolution, _FRAME_VERSION)


def place_targets(
    record: Mapping[str, Any],
    queries: Sequence[Query],
    *,
    mask_size: int | None,
    placement: Placement,
    max_objects: int | None,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The targets of an image's queries; needs no pixels.

    Args:
        record: A row of the index.
        queries: From `build_queries`.
        mask_size: Side M of the masks, or None.
        placement: Where the image lies in the frame.
        max_objects: Largest number of objects of a query; None for no limit.
        rng: Chooses the subset when `max_objects` bites.

    Returns:
        Per query `prompts`, `categories`, `is_positive`, `num_targets`; per target, packed in query order,
        `boxes_cxcywh` float32 (T, 4) relative to the frame, `masks_packed` uint8 (T, ceil(M * M / 8)) bits of (M, M)
        or None, `mask_valid` bool (T,), `annotation_ids` int64 (T,); `num_limited`, the objects left out by
        `max_objects`.
    """
    size_hw = (record["height"], record["width"])
    annotations = record["annotations"]
    kept_queries, rows, num_limited = [], [], 0
    for query in queries:
        query_rows = [row for row in query.annotation_rows if _has_area(annotations[row]["bbox_xywh"], size_hw)]
        if query.is_positive and not query_rows:
            continue  # the category is there, but nothing of it can be matched: neither positive nor negative
        if max_objects is not None and len(query_rows) > max_objects:
            num_limited += len(query_rows) - max_objects
            chosen = rng.choice(len(query_rows), size=max_objects, replace=False)
            query_rows = [query_rows[i] for i in sorted(chosen)]
        kept_queries.append((query, len(query_rows)))
        rows += query_rows
    masks_packed, mask_valid = _draw_masks([annotations[row] for row in rows], size_hw, placement, mask_size)
    return {
        "prompts": [query.prompt for query, _ in kept_queries],
        "categories": [query.category for query, _ in kept_queries],
        "is_positive": np.array([query.is_positive for query, _ in kept_queries], dtype=bool),
        "num_targets": np.array([count for _, count in kept_queries], dtype=np.int64),
        "boxes_cxcywh": _place_boxes([annotations[row]["bbox_xywh"] for row in rows], size_hw, placement),
        "masks_packed": masks_packed,
        "mask_valid": mask_valid,
        "annotation_ids": np.array([annotations[row]["id"] for row in rows], dtype=np.int64),
        "num_limited": num_limited,
    }


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
