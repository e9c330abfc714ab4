"""Post-processing of one prompt in one image: merging, suppression of overlaps, and the limit.

Overlaps are measured on the masks as the model makes them (288 x 288 at 1008): enlarging both masks of a pair changes
their intersection and union alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torchvision.ops import box_iou

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.transfers import download, upload


class Selection(NamedTuple):
    """The detections that stay, by descending score.

    `index_N` are their positions in the input. `mask_logits_NHW` is None if the input had none. Where `is_merged_N` is
    true, the mask is a union and the box of that detection no longer encloses it.
    """

    index_N: Tensor
    mask_logits_NHW: Tensor | None
    is_merged_N: np.ndarray


def select(
    scores_N: Tensor,
    boxes_xyxy_N4: Tensor,
    mask_logits_NHW: Tensor | None,
    settings: PostProcessing,
    *,
    merge_threshold: float = 0.0,
    mask_overlaps_NN: np.ndarray | None = None,
) -> Selection:
    """Merge or suppress overlapping detections, then keep the best `max_detections`.

    Args:
        scores_N: Descending, all at or above the threshold.
        boxes_xyxy_N4: In any unit.
        mask_logits_NHW: None where neither merging nor suppression needs them.
        merge_threshold: Detections with a lower score are not merged; suppression still applies to them.
        mask_overlaps_NN: IoU of every pair of masks, if the caller has it: without merging no masks are needed then.
    """
    has_overlaps = mask_overlaps_NN is not None and not settings.merge
    if len(scores_N) and settings.needs_masks and mask_logits_NHW is None and not has_overlaps:
        raise ValueError(f"nms={settings.nms!r}, merge={settings.merge} need masks")
    index = np.arange(len(scores_N))
    is_merged = np.zeros(len(index), dtype=bool)
    if settings.merge and len(index) > 1:
        assert mask_logits_NHW is not None
        num_mergeable = int((scores_N >= merge_threshold).sum())
        mask_logits_NHW, index, is_merged = _merge(mask_logits_NHW, num_mergeable, settings.merge_iou)
    if settings.nms != "none" and settings.nms_iou < 1 and len(index) > 1:
        rows = torch.from_numpy(index).to(scores_N.device)
        if has_overlaps and settings.nms == "mask":
            assert mask_overlaps_NN is not None
            overlaps = mask_overlaps_NN
        elif settings.nms == "mask" or settings.merge:  # the boxes of unions are not known yet
            assert mask_logits_NHW is not None
            overlaps = mask_iou(mask_logits_NHW > 0).cpu().numpy()
        else:
            overlaps = box_iou(boxes_xyxy_N4[rows].float(), boxes_xyxy_N4[rows].float()).cpu().numpy()
        kept = suppress(overlaps, settings.nms_iou)
    else:
        kept = np.arange(len(index))
    kept = kept[: settings.max_detections]
    rows = torch.from_numpy(kept).to(scores_N.device)
    logits = None if mask_logits_NHW is None else mask_logits_NHW[rows]
    return Selection(torch.from_numpy(index[kept]).to(scores_N.device), logits, is_merged[kept])


def mask_iou(masks_NHW: Tensor) -> Tensor:
    """IoU of every pair of boolean masks (N, H, W), float32 (N, N); 0 where a mask is empty. One matrix product."""
    flat_NP = masks_NHW.flatten(1).float()
    with torch.autocast(flat_NP.device.type, enabled=False):  # bfloat16 counts to 256
        intersection_NN = flat_NP @ flat_NP.T
    area_N = intersection_NN.diagonal()
    return intersection_NN / (area_N[:, None] + area_N[None, :] - intersection_NN).clamp(min=1)


def mask_iou_of_groups(masks_MHW: Tensor, counts: Sequence[int]) -> list[np.ndarray]:
    """`mask_iou` (N, N) within each group of consecutive boolean masks, on the host."""
    if masks_MHW.device.type == "cpu":
        return [mask_iou(masks_NHW).numpy() for masks_NHW in masks_MHW.split(list(counts))]
    return padded_mask_iou(masks_MHW, counts)


def padded_mask_iou(masks_MHW: Tensor, counts: Sequence[int]) -> list[np.ndarray]:
    """As `mask_iou_of_groups`, for a GPU: one batched product of groups padded to the largest, and one copy."""
    most = max(counts)
    flat_MP = masks_MHW.flatten(1)
    if min(counts) < most:  # padding repeats the first mask
        of_group = zip(torch.arange(len(flat_MP)).split(list(counts)), counts, strict=True)
        index = torch.cat([torch.cat([own, own.new_zeros(most - count)]) for own, count in of_group])
        flat_MP = flat_MP.index_select(0, upload(index, flat_MP.device))
    flat_GNP = flat_MP.unflatten(0, (len(counts), most)).float()
    with torch.autocast(flat_GNP.device.type, enabled=False):  # bfloat16 counts to 256
        intersections_GNN = download(torch.bmm(flat_GNP, flat_GNP.mT)).numpy()
    found = []
    for intersection_NN, count in zip(intersections_GNN, counts, strict=True):
        shared = intersection_NN[:count, :count]
        area = shared.diagonal()
        found.append(shared / (area[:, None] + area[None, :] - shared).clip(min=1))
    return found


def suppress(overlaps_NN: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Greedy non-maximum suppression: ascending positions of the detections that stay.

    The IoU of every pair is given by descending score. A detection that overlaps a better kept one by more than the
    threshold goes.

    >>> suppress(np.array([[1, 0.8, 0.1], [0.8, 1, 0.6], [0.1, 0.6, 1]]), 0.5)
    array([0, 2])
    """
    alive = np.ones(len(overlaps_NN), dtype=bool)
    for best in range(len(overlaps_NN)):
        if alive[best]:
            # Not "<=": the IoU of two boxes without area is NaN, which is no overlap.
            alive[best + 1 :] &= ~(overlaps_NN[best, best + 1 :] > iou_threshold)
    return np.flatnonzero(alive)


def _merge(logits_NHW: Tensor, num_mergeable: int, merge_iou: float) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Join those of the first `num_mergeable` detections that overlap; the best of each union stands for it.

    The union of masks is the maximum of their logits.
    """
    overlaps = mask_iou(logits_NHW[:num_mergeable] > 0).cpu().numpy()
    _, label_N = connected_components(csr_array(overlaps >= merge_iou), directed=False)
    groups = [np.flatnonzero(label_N == label) for label in dict.fromkeys(label_N.tolist())]
    rest = np.arange(num_mergeable, len(logits_NHW))
    rows = [torch.from_numpy(group).to(logits_NHW.device) for group in groups]
    merged = [logits_NHW[group].amax(0) for group in rows]
    logits = torch.cat([torch.stack(merged), logits_NHW[num_mergeable:]]) if merged else logits_NHW
    index = np.concatenate([np.array([group[0] for group in groups], dtype=np.int64), rest])
    is_merged = np.concatenate([np.array([len(group) > 1 for group in groups], dtype=bool), np.zeros(len(rest), bool)])
    return logits, index, is_merged
