"""Annotations that need no cleaning, found in bulk: nearly all of most files.

An annotation is plain if `clean_annotation` would change and count nothing about it, except for the note that it has no
mask. Any doubt makes it not plain.

Shapes: `A` annotations, `P` parts of their polygons, `N` points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from sam3lora.data import plain_rles
from sam3lora.data.annotations import AGREEING_IOU, MIN_BOX_AREA, SHARE_SLACK, SLACK_PX
from sam3lora.data.coco_file import AnnotationEntry
from sam3lora.data.polygons import MAX_OUTLINE_PX

_NO_MASK = (b"", b"[]", b"null")
_SPACE = b" \t\r\n"
_MIN_AREA_PX = 1e-6  # rounding decides about less

_boxes = msgspec.json.Decoder(list[list[float]])
_polygons = msgspec.json.Decoder(list[list[list[float]]])


@dataclass
class PlainAnnotations:
    """The cleaned boxes (xywh, clipped) and masks (JSON text or None) of those among A annotations that are plain."""

    is_plain_A: np.ndarray
    boxes_xywh_A4: np.ndarray  # NaN where not plain
    masks_A: list[bytes | None]


def find_plain(entries: Sequence[AnnotationEntry], sizes_hw_A2: np.ndarray) -> PlainAnnotations:
    """Look at boxes and masks of entries whose images have these sizes; the caller has read everything else of them."""
    boxes_A4 = _read_boxes(entries)
    texts = [_compact(entry.segmentation) for entry in entries]
    has_polygons_A = np.array([text.startswith(b"[[") for text in texts], dtype=bool)
    has_rle_A = np.array([text.startswith(b"{") for text in texts], dtype=bool)
    no_mask_A = np.array([text in _NO_MASK for text in texts], dtype=bool)
    limits_xy_A2 = sizes_hw_A2[:, ::-1].astype(float)
    boxes_xyxy_A4 = np.concatenate([boxes_A4[:, :2], boxes_A4[:, :2] + boxes_A4[:, 2:]], axis=1)
    clipped_A4 = _clip(boxes_xyxy_A4, limits_xy_A2)
    is_good_A = (boxes_A4[:, 2:] > 0).all(axis=1) & _is_inside(boxes_xyxy_A4, limits_xy_A2)
    is_good_A &= _has_area(clipped_A4, limits_xy_A2)
    is_good_A &= (boxes_xyxy_A4 > 1 + SHARE_SLACK).any(axis=1)  # otherwise it may be in shares of the image
    masks_A4, has_mask_A = np.full((len(entries), 4), np.nan), np.zeros(len(entries), dtype=bool)
    rows = np.flatnonzero(has_polygons_A & is_good_A)
    masks_A4[rows], has_mask_A[rows] = _read_polygons([texts[row] for row in rows])
    rows = np.flatnonzero(has_rle_A & is_good_A)
    masks_A4[rows], has_mask_A[rows], rles = _read_rles([texts[row] for row in rows], sizes_hw_A2[rows])
    for row, rle in zip(rows, rles, strict=True):
        texts[row] = rle
    has_mask_A &= _is_inside(masks_A4, limits_xy_A2)
    masks_A4 = _clip(masks_A4, limits_xy_A2)
    has_mask_A &= _has_area(masks_A4, limits_xy_A2) & (_iou(clipped_A4, masks_A4) >= AGREEING_IOU)
    is_plain_A = is_good_A & (no_mask_A | has_mask_A)
    clipped_A4[:, 2:] -= clipped_A4[:, :2]
    return PlainAnnotations(
        is_plain_A, clipped_A4, [None if bare else text for bare, text in zip(no_mask_A, texts, strict=True)]
    )


def _compact(raw: msgspec.Raw) -> bytes:
    """JSON text without surrounding space, of polygons without any; what is text in them makes no plain mask."""
    text = bytes(raw)
    if b" " in text or b"\n" in text:
        text = text.strip(_SPACE)
        return text.translate(None, _SPACE) if text.startswith(b"[") else text
    return text


def _read_boxes(entries: Sequence[AnnotationEntry]) -> np.ndarray:
    """Boxes (A, 4) as they are written; NaN for what is no list of four numbers."""
    boxes_A4 = np.full((len(entries), 4), np.nan)
    for rows, decoded in _decode(_boxes, [bytes(entry.bbox) or b"[]" for entry in entries]):
        kept = [row for row, box in zip(rows, decoded, strict=True) if len(box) == 4]
        if kept:
            boxes_A4[kept] = [box for box in decoded if len(box) == 4]
    return boxes_A4


def _read_polygons(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes xyxy (A, 4) around polygons, and which of them (A,) are such that they can be used as they are."""
    boxes_A4, is_good_A = np.full((len(texts), 4), np.nan), np.zeros(len(texts), dtype=bool)
    for rows, polygons in _decode(_polygons, texts):
        usable = _are_usable(polygons)
        kept = [row for row, good in zip(rows, usable, strict=True) if good]
        if kept:
            boxes_A4[kept], is_good_A[kept] = _measure(
                [parts for parts, good in zip(polygons, usable, strict=True) if good]
            )
    return boxes_A4, is_good_A


def _read_rles(texts: Sequence[bytes], sizes_hw_A2: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """The same for compressed run-length masks, and their JSON text without other keys."""
    boxes_A4, is_good_A = np.full((len(texts), 4), np.nan), np.zeros(len(texts), dtype=bool)
    alone = list(texts)
    for rows, rles in _decode(plain_rles.decoder, texts):
        kept = list(rows)
        if kept:
            boxes_A4[kept], is_good_A[kept] = plain_rles.measure_rles(rles, sizes_hw_A2[kept])
            for row, rle in zip(kept, rles, strict=True):
                alone[row] = msgspec.json.encode(rle)
    return boxes_A4, is_good_A, alone


def _are_usable(polygons: list[list[list[float]]]) -> np.ndarray:
    """Whether each mask (A,) has parts, each of whole points and of at least three."""
    num_parts_A = np.fromiter(map(len, polygons), np.int64, len(polygons))
    num_values_P = np.fromiter(map(len, chain.from_iterable(polygons)), np.int64, int(num_parts_A.sum()))
    bad_P = (num_values_P < 6) | (num_values_P % 2 > 0)
    num_bad_A = np.bincount(np.repeat(np.arange(len(polygons)), num_parts_A), weights=bad_P, minlength=len(polygons))
    return (num_parts_A > 0) & (num_bad_A == 0)


def _measure(polygons: list[list[list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Box xyxy of each mask, and whether it has an area and an outline that is not endless."""
    num_parts_A = np.fromiter(map(len, polygons), np.int64, len(polygons))
    parts = list(chain.from_iterable(polygons))
    num_points_P = np.fromiter(map(len, parts), np.int64, len(parts)) // 2
    values = np.fromiter(chain.from_iterable(parts), np.float64, 2 * int(num_points_P.sum()))
    xs_N, ys_N = values[0::2], values[1::2]
    starts_P = np.concatenate([[0], np.cumsum(num_points_P)[:-1]])
    starts_A = np.concatenate([[0], np.cumsum(num_parts_A)[:-1]])
    before_N = np.arange(-1, len(xs_N) - 1)
    before_N[starts_P] = starts_P + num_points_P - 1
    points_A = starts_P[starts_A]
    box_A4 = np.stack(
        [
            np.minimum.reduceat(xs_N, points_A),
            np.minimum.reduceat(ys_N, points_A),
            np.maximum.reduceat(xs_N, points_A),
            np.maximum.reduceat(ys_N, points_A),
        ],
        axis=1,
    )
    last_x_N, last_y_N = xs_N[before_N], ys_N[before_N]
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers that are no coordinates
        area_P = np.abs(np.add.reduceat(last_x_N * ys_N - xs_N * last_y_N, starts_P)) / 2
        outline_N = np.maximum(np.abs(xs_N - last_x_N), np.abs(ys_N - last_y_N))
        is_good_A = np.maximum.reduceat(area_P, starts_A) > _MIN_AREA_PX
        is_good_A &= np.add.reduceat(outline_N, points_A) <= MAX_OUTLINE_PX
    return box_A4, is_good_A


def _decode(decoder: msgspec.json.Decoder, texts: Sequence[bytes]) -> Any:
    """(rows, values) of the texts that the decoder accepts: all at once, or one by one where some are refused."""
    try:
        yield range(len(texts)), decoder.decode(b"[" + b",".join(texts) + b"]")
        return
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    if len(texts) > 64:  # most parts of a large chunk are accepted
        half = len(texts) // 2
        for start, part in ((0, texts[:half]), (half, texts[half:])):
            for rows, values in _decode(decoder, part):
                yield [start + row for row in rows], values
        return
    for row, text in enumerate(texts):
        try:
            yield [row], decoder.decode(b"[" + text + b"]")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue


def _clip(boxes_xyxy_A4: np.ndarray, limits_xy_A2: np.ndarray) -> np.ndarray:
    return np.clip(boxes_xyxy_A4, 0.0, np.tile(limits_xy_A2, 2))


def _is_inside(boxes_xyxy_A4: np.ndarray, limits_xy_A2: np.ndarray) -> Any:
    """Whether a box leaves its image by no more than the slack; not so for NaN."""
    above = (boxes_xyxy_A4[:, :2] >= -SLACK_PX).all(axis=1)
    return above & (boxes_xyxy_A4[:, 2:] <= limits_xy_A2 + SLACK_PX).all(axis=1)


def _has_area(boxes_xyxy_A4: np.ndarray, limits_xy_A2: np.ndarray) -> np.ndarray:
    sides_A2 = boxes_xyxy_A4[:, 2:] - boxes_xyxy_A4[:, :2]
    return sides_A2.prod(axis=1) >= MIN_BOX_AREA * limits_xy_A2.prod(axis=1)


def _iou(a_A4: np.ndarray, b_A4: np.ndarray) -> np.ndarray:
    sides_A2 = np.minimum(a_A4[:, 2:], b_A4[:, 2:]) - np.maximum(a_A4[:, :2], b_A4[:, :2])
    inter_A = np.maximum(sides_A2, 0).prod(axis=1)
    area_a_A, area_b_A = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a_A4, b_A4))
    with np.errstate(divide="ignore", invalid="ignore"):
        return inter_A / (area_a_A + area_b_A - inter_A)
