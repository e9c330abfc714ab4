"""From the detector's object queries to the detections of each find query, as small masks, then at the image's size.

Shapes: `B` find queries (an image with a prompt), `Q` object queries, `N` detections of one find query, `M` selected
(find query, object query) pairs, `h` `w` the size of the masks that the model makes (288 at 1008).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import Detections
from sam3lora.engine.mask_codes import encode_logits, has_pixel, rle_area_px, rle_box_xyxy
from sam3lora.engine.postprocess import Selection, mask_iou_of_groups, select
from sam3lora.engine.transfers import download, upload
from sam3lora.errors import UserError
from sam3lora.model.staged.stage_outputs import DetectorOutput

MASKS_AT_ONCE = 256
"""Masks of several find queries that are in memory together: 85 MB of logits at 1008."""

MASKS_AT_ONCE_ON_GPU = 1024
"""The same on a GPU, where every group of find queries costs two waits."""


def masks_at_once(device: torch.device) -> int:
    return MASKS_AT_ONCE_ON_GPU if device.type == "cuda" else MASKS_AT_ONCE


class NotFiniteError(UserError):
    """The model computed NaN or infinite values for a find query: its weights, or an adapter's, have diverged."""


MaskLogits = Callable[[Tensor, Tensor], Tensor]
"""Indices (M,) of find queries and of their object queries -> mask logits (M, h, w)."""


class Wanted(NamedTuple):
    """What is wanted of one find query.

    Attributes:
        size_hw: Height and width of the image in pixels.
        masks: Whether the result shall have masks. Suppression by masks makes them in any case.
        lowest_score: Keep detections down to this score (mAP needs all of them), but merge only those at or above the
            threshold; None keeps those at or above the threshold.
    """

    prompt: str
    size_hw: tuple[int, int]
    post: PostProcessing
    masks: bool = True
    lowest_score: float | None = None

    @property
    def threshold(self) -> float:
        return self.post.threshold_of(self.prompt)

    @property
    def score_cut(self) -> float:
        return self.threshold if self.lowest_score is None else self.lowest_score


@dataclass(frozen=True)
class SmallDetections:
    """Detections of one find query, by descending score, on the CPU, with masks at the size that the model makes.

    Attributes:
        presence: Probability in [0, 1] that the image shows the prompt.
        scores_N: float32 (N,).
        boxes_cxcywh_N4: float32 (N, 4), relative to the model's input, which the whole image fills.
        mask_logits_NHW: float32 (N, h, w); None if no masks were made.
        is_merged_N: Where true, the mask is a union, and the box does not enclose it.
        num_before_nms: How many there were before merging, suppression and the limit.
        is_finite: False if an output of the model is NaN or infinite; there are no detections then.
    """

    wanted: Wanted
    presence: float
    scores_N: np.ndarray = field(repr=False)
    boxes_cxcywh_N4: np.ndarray = field(repr=False)
    mask_logits_NHW: np.ndarray | None = field(repr=False)
    is_merged_N: np.ndarray = field(repr=False)
    num_before_nms: int = 0
    is_finite: bool = True

    def encode(self, row: int) -> dict:
        """The RLE of one mask at the image's size."""
        assert self.mask_logits_NHW is not None
        return encode_logits(self.mask_logits_NHW[row], self.wanted.size_hw)

    def check_finite(self) -> None:
        """Raise NotFiniteError if an output of the model is NaN or infinite."""
        if not self.is_finite:
            raise NotFiniteError(
                f"the outputs for {self.wanted.prompt!r} are NaN or infinite: the training of the adapter or the model "
                "diverged, use another one"
            )

    def at_full_size(self, rles: list[dict] | None = None, *, keep_logits: bool = False) -> Detections:
        """Boxes in pixels of the image, and masks as RLE: from `encode` for each row, if the caller has made them.

        Detections whose mask has no pixel of the image are left out; where no masks were made, none is. `keep_logits`
        hands the small masks on, for clicks to start from.

        Raises:
            NotFiniteError: An output of the model is NaN or infinite.
        """
        self.check_finite()
        if rles is None and self.mask_logits_NHW is not None and self.wanted.masks:
            rles = [self.encode(row) for row in range(len(self.scores_N))]
        boxes_xyxy = _to_pixels(self.boxes_cxcywh_N4, self.wanted.size_hw)
        for row in np.flatnonzero(self.is_merged_N):
            boxes_xyxy[row] = rle_box_xyxy(self.encode(int(row)) if rles is None else rles[row])
        seen = [row for row in range(len(self.scores_N)) if self._is_seen(row, rles)]
        return Detections(
            self.wanted.prompt,
            self.presence,
            self.wanted.size_hw,
            self.scores_N[seen],
            boxes_xyxy[seen],
            [rles[row] for row in seen]
            if rles is not None and self.wanted.masks
            else []
            if self.wanted.masks
            else None,
            self.num_before_nms,
            mask_logits_NHW=self.mask_logits_NHW[seen] if keep_logits and self.mask_logits_NHW is not None else None,
        )

    def _is_seen(self, row: int, rles: list[dict] | None) -> bool:
        """Whether the mask has a pixel at the image's size."""
        if rles is not None:
            return rle_area_px(rles[row]) > 0
        return self.mask_logits_NHW is None or has_pixel(self.mask_logits_NHW[row], self.wanted.size_hw)


class _Candidates(NamedTuple):
    """Detections of one find query above the cut; `selection` is None while their masks are needed to select."""

    scores_N: Tensor
    boxes_cxcywh_N4: Tensor
    query_N: Tensor
    selection: Selection | None

    @property
    def num_masks(self) -> int:
        return len(self.query_N if self.selection is None else self.selection.index_N)


def pack_answers(output: DetectorOutput) -> Tensor:
    """Score, box (cx, cy, w, h) and presence of each object query (B, Q, 6): what the host needs, in one tensor."""
    scores_BQ = output.scores_BQ()
    boxes_BQ4 = output.boxes_cxcywh_LBQ4[-1].float()
    presence_BQ = output.presence_logits_LB[-1].float().sigmoid()[:, None].expand_as(scores_BQ)
    return torch.cat([scores_BQ[..., None], boxes_BQ4, presence_BQ[..., None]], -1)


def select_detections(
    output: DetectorOutput, wanted_B: Sequence[Wanted], mask_head: Callable[[list[int]], MaskLogits]
) -> Iterator[SmallDetections]:
    """Post-process each find query by its own settings; few masks are in memory at a time.

    `mask_head` is called once with the find queries that need masks, and returns the function that makes them. Indices
    are on the CPU.
    """
    return select_answers(pack_answers(output), wanted_B, mask_head)


def select_answers(
    answers_BQ6: Tensor, wanted_B: Sequence[Wanted], mask_head: Callable[[list[int]], MaskLogits]
) -> Iterator[SmallDetections]:
    """As `select_detections`, from `pack_answers`."""
    most_masks = masks_at_once(answers_BQ6.device)
    answers_BQ6 = download(answers_BQ6)
    is_finite_B = answers_BQ6.isfinite().flatten(1).all(1)
    scores_BQ, query_BQ = answers_BQ6[..., 0].sort(dim=1, descending=True, stable=True)
    boxes_BQ4 = answers_BQ6[..., 1:5].gather(1, query_BQ[..., None].expand(-1, -1, 4))
    cut_B = torch.tensor([wanted.score_cut for wanted in wanted_B])
    num_B = (scores_BQ >= cut_B[:, None]).sum(1).where(is_finite_B, 0).tolist()
    found_B = []
    for b, (num, wanted) in enumerate(zip(num_B, wanted_B, strict=True)):
        scores_N, boxes_N4 = scores_BQ[b, :num], boxes_BQ4[b, :num]
        # Boxes alone can decide now, and masks are then made for the selected detections only.
        selection = None if wanted.post.needs_masks and num else select(scores_N, _xyxy(boxes_N4), None, wanted.post)
        found_B.append(_Candidates(scores_N, boxes_N4, query_BQ[b, :num], selection))
    masks_B = _with_masks(found_B, wanted_B, mask_head, most_masks)
    presence_B = answers_BQ6[:, 0, 5].tolist()
    for wanted, found, (selection, small_NHW), presence, is_finite in zip(
        wanted_B, found_B, masks_B, presence_B, is_finite_B.tolist(), strict=True
    ):
        yield SmallDetections(
            wanted,
            presence,
            found.scores_N[selection.index_N].numpy(),
            found.boxes_cxcywh_N4[selection.index_N].numpy(),
            small_NHW,
            selection.is_merged_N,
            len(found.scores_N),
            is_finite=is_finite and (small_NHW is None or bool(np.isfinite(small_NHW).all())),
        )


def _with_masks(
    found_B: Sequence[_Candidates],
    wanted_B: Sequence[Wanted],
    mask_head: Callable[[list[int]], MaskLogits],
    most_masks: int,
) -> Iterator[tuple[Selection, np.ndarray | None]]:
    """For each find query what is selected, and its mask logits (N, h, w); None for no masks."""
    num_of = {
        b: found.num_masks
        for b, (found, wanted) in enumerate(zip(found_B, wanted_B, strict=True))
        if (wanted.masks or found.selection is None) and found.num_masks
    }
    logits_of = mask_head(list(num_of)) if num_of else None
    made: dict[int, tuple[Selection, np.ndarray]] = {}
    for b, found in enumerate(found_B):
        if logits_of is not None and b in num_of and b not in made:
            group = _group_from(num_of, b, most_masks)
            together = _select_by_masks(
                [found_B[row] for row in group], [wanted_B[row] for row in group], group, logits_of
            )
            made = dict(zip(group, together, strict=True))
        if b in made:
            yield made.pop(b)
        else:
            assert found.selection is not None
            yield found.selection, None


def _select_by_masks(
    found_G: Sequence[_Candidates], wanted_G: Sequence[Wanted], rows_G: Sequence[int], logits_of: MaskLogits
) -> list[tuple[Selection, np.ndarray]]:
    """Selections and mask logits (N, h, w) of find queries whose masks are made together.

    A GPU is asked twice, whatever the number of find queries: for the overlaps, and for the masks that stay.
    """
    counts = [found.num_masks for found in found_G]
    queries_G = [one.query_N if one.selection is None else one.query_N[one.selection.index_N] for one in found_G]
    row_M = torch.tensor(rows_G).repeat_interleave(torch.tensor(counts))
    logits_MHW = logits_of(row_M, torch.cat(queries_G))
    overlaps_G = _overlaps(logits_MHW, found_G, wanted_G, counts)
    selections: list[Selection] = []
    stays_M: list[Tensor] = []
    for found, wanted, position_N, overlaps_NN in zip(
        found_G, wanted_G, torch.arange(len(row_M)).split(counts), overlaps_G, strict=True
    ):
        selection = found.selection
        if selection is None:
            logits_NHW = logits_MHW[position_N[0] : position_N[-1] + 1] if overlaps_NN is None else None
            selection = select(
                found.scores_N,
                _xyxy(found.boxes_cxcywh_N4),
                logits_NHW,
                wanted.post,
                merge_threshold=wanted.threshold,
                mask_overlaps_NN=overlaps_NN,
            )
            position_N = position_N[selection.index_N]
        selections.append(selection)
        # Unions are new masks.
        stays_M.append(position_N[:0] if selection.mask_logits_NHW is not None else position_N)
    stays = torch.cat(stays_M)
    if len(stays) < len(logits_MHW):
        logits_MHW = logits_MHW.index_select(0, upload(stays, logits_MHW.device))
    kept_G = download(logits_MHW).float().split([len(position_N) for position_N in stays_M])
    return [
        (
            selection,
            (kept_NHW if selection.mask_logits_NHW is None else selection.mask_logits_NHW.cpu().float()).numpy(),
        )
        for selection, kept_NHW in zip(selections, kept_G, strict=True)
    ]


def _overlaps(
    logits_MHW: Tensor, found_G: Sequence[_Candidates], wanted_G: Sequence[Wanted], counts: Sequence[int]
) -> list[np.ndarray | None]:
    """The IoU of every pair of masks of each find query; None where masks do not select, or where they are merged."""
    needed = [
        found.selection is None and not wanted.post.merge for found, wanted in zip(found_G, wanted_G, strict=True)
    ]
    if not any(count > 1 for count, needs in zip(counts, needed, strict=True) if needs):
        return [np.ones((count, count)) if needs else None for count, needs in zip(counts, needed, strict=True)]
    overlaps_G = mask_iou_of_groups(logits_MHW > 0, counts)
    return [overlaps if needs else None for overlaps, needs in zip(overlaps_G, needed, strict=True)]


def _group_from(num_of: dict[int, int], first: int, most_masks: int) -> list[int]:
    """Find queries from `first` on, as many as have at most `most_masks` masks together, and at least one."""
    group: list[int] = []
    num = 0
    for b, num_masks in num_of.items():
        if b >= first:
            num += num_masks
            if group and num > most_masks:
                break
            group.append(b)
    return group


def _xyxy(boxes_cxcywh: Tensor) -> Tensor:
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _to_pixels(boxes_cxcywh: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) relative to the model's input, which the whole image fills -> xyxy pixels within the image."""
    height, width = size_hw
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    xyxy = np.concatenate([centre - half, centre + half], axis=1).clip(0, 1)
    return (xyxy * (width, height, width, height)).astype(np.float32)
