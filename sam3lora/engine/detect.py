"""Detections of many prompts in a batch of images: one vision pass, masks of the kept object queries only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam3lora.engine.detections import Instances, PostProcessing
from sam3lora.engine.mask_codes import encode_logits, rle_box_xyxy
from sam3lora.engine.postprocess import Selection, select
from sam3lora.model.staged.forward import DetectorOutput, StagedSam3, TextFeatures, VisionFeatures
from sam3lora.model.tokenization import tokenize

TextCache = dict[str, TextFeatures]
"""Prompt -> its features (P = 1). Valid for one state of the weights: start a new one after a training step."""

EVERYTHING = PostProcessing(threshold=0.0, nms="none")
"""The best 100 object queries as they are."""

PADDING_LABEL = -10
MASKS_AT_ONCE = 256  # 85 MB of logits at 1008


class Exemplars(NamedTuple):
    """Boxes that show what is meant, for each of ``I`` images; rows are filled up with label -10."""

    boxes_cxcywh_IN4: Tensor
    labels_IN: Tensor


@torch.no_grad()
def detect_prompts(
    staged: StagedSam3,
    tokenizer: Any,
    pixel_values_ICHW: Tensor,
    prompts: Sequence[str],
    *,
    sizes_hw: Sequence[tuple[int, int]],
    post: PostProcessing = EVERYTHING,
    masks: bool = True,
    exemplars: Exemplars | None = None,
    vision: VisionFeatures | Callable[[], VisionFeatures] | None = None,
    max_prompts_per_forward: int = 8,
    text_cache: TextCache | None = None,
) -> list[list[Instances]]:
    """Ask every prompt of every image.

    The vision tower runs once for the batch; (image, prompt) pairs then go through the detector a few at a time, and
    only the masks of kept detections are brought to the original size, so memory does not grow with the prompts.

    Args:
        staged: The model, in evaluation mode.
        tokenizer: The base model's tokenizer.
        pixel_values_ICHW: Normalised images on the model's device.
        prompts: Non-empty texts.
        sizes_hw: Height and width of each original image in pixels.
        post: Threshold, suppression or merging, and limit.
        masks: Whether masks are wanted; without them only boxes are made.
        exemplars: Boxes that go with every prompt of their image.
        vision: Features of these images from an earlier pass of the vision tower, or what gets them.
        max_prompts_per_forward: Most (image, prompt) pairs at a time.
        text_cache: Features of prompts seen before; new ones are added.

    Returns:
        For each image, for each prompt in the given order, its `Instances`.
    """
    if len(sizes_hw) != len(pixel_values_ICHW):
        raise ValueError(f"expected a size for each of {len(pixel_values_ICHW)} images, got {len(sizes_hw)}")
    found: list[list[Instances]] = [[] for _ in sizes_hw]
    if not len(sizes_hw) or not prompts:
        return found
    device = pixel_values_ICHW.device
    text = _text_features(staged, tokenizer, prompts, {} if text_cache is None else text_cache, device)
    if not isinstance(vision, VisionFeatures):
        vision = staged.encode_images(pixel_values_ICHW) if vision is None else vision()
    pairs = [(image, prompt) for image in range(len(sizes_hw)) for prompt in range(len(prompts))]
    for chunk, boxed in _chunks(pairs, _has_boxes(exemplars, staged, len(sizes_hw)), max_prompts_per_forward):
        image_index_B, text_index_B = torch.tensor(chunk, device=device).unbind(1)
        detections = staged.detect(
            vision,
            text,
            image_index_B,
            text_index_B,
            boxes_cxcywh_BN4=exemplars.boxes_cxcywh_IN4[image_index_B] if exemplars and boxed else None,
            box_labels_BN=exemplars.labels_IN[image_index_B] if exemplars and boxed else None,
        )

        def mask_head(rows: list[int], detections: DetectorOutput = detections) -> MaskLogits:
            return staged.mask_head(detections, torch.tensor(rows)).instance_logits

        kept = keep(detections, [post] * len(chunk), [masks] * len(chunk), mask_head)
        for (image, prompt), query in zip(chunk, kept, strict=True):
            found[image].append(to_instances(prompts[prompt], sizes_hw[image], query))
    return found


def _text_features(
    staged: StagedSam3, tokenizer: Any, prompts: Sequence[str], cache: TextCache, device: torch.device
) -> TextFeatures:
    input_ids, attention_mask = tokenize(tokenizer, prompts)
    position = {prompt: row for row, prompt in enumerate(prompts)}
    missing = [prompt for prompt in position if prompt not in cache]
    if missing:
        rows = [position[prompt] for prompt in missing]
        features = staged.encode_text(input_ids[rows].to(device), attention_mask[rows].to(device))
        for row, prompt in enumerate(missing):
            cache[prompt] = TextFeatures(features.embeds_PTC[row : row + 1], features.mask_PT[row : row + 1])
    found = [cache[prompt] for prompt in prompts]
    return TextFeatures(torch.cat([one.embeds_PTC for one in found]), torch.cat([one.mask_PT for one in found]))


def _has_boxes(exemplars: Exemplars | None, staged: StagedSam3, num_images: int) -> list[bool]:
    """Whether each image goes with the boxes; with the CLS token an image without any may as well.

    Without it, one box gives the token to all that are asked together.
    """
    if exemplars is None or staged.geometry_cls:
        return [exemplars is not None] * num_images
    return (exemplars.labels_IN != PADDING_LABEL).any(1).tolist()


def _chunks(
    pairs: Sequence[tuple[int, int]], has_boxes_I: Sequence[bool], most: int
) -> Iterator[tuple[list[tuple[int, int]], bool]]:
    for boxed, group in groupby(pairs, key=lambda pair: has_boxes_I[pair[0]]):
        alike = list(group)
        for start in range(0, len(alike), most):
            yield alike[start : start + most], boxed


MaskLogits = Callable[[Tensor, Tensor], Tensor]
"""Indices (M,) of find queries and of their object queries -> mask logits (M, h, w)."""


class Kept(NamedTuple):
    """The kept detections of one find query, by descending score, on the CPU."""

    presence: float
    scores_N: np.ndarray
    boxes_cxcywh_N4: np.ndarray
    mask_logits_NHW: np.ndarray | None
    is_merged_N: np.ndarray
    num_before_nms: int


class _Candidates(NamedTuple):
    """Detections of one find query at the threshold; `selection` is None if it takes their masks to select."""

    post: PostProcessing
    scores_N: Tensor
    boxes_cxcywh_N4: Tensor
    query_N: Tensor
    selection: Selection | None


def keep(
    detections: DetectorOutput,
    posts_B: Sequence[PostProcessing],
    masks_B: Sequence[bool],
    mask_head: Callable[[list[int]], MaskLogits],
) -> Iterator[Kept]:
    """Post-process each of ``B`` find queries in its own way; few masks are in memory at a time.

    Args:
        detections: Of all find queries.
        posts_B: Threshold, suppression or merging, and limit.
        masks_B: Whether masks are wanted.
        mask_head: Gets the find queries that need masks, once, and gives what makes them; indices are on the CPU.
    """
    scores_BQ, query_BQ = detections.scores_BQ().sort(dim=1, descending=True, stable=True)
    boxes_BQ4 = detections.boxes_cxcywh_LBQ4[-1].float().gather(1, query_BQ[:, :, None].expand(-1, -1, 4)).cpu()
    scores_BQ, query_BQ = scores_BQ.cpu(), query_BQ.cpu()
    presence_B = detections.presence_logits_LB[-1].float().sigmoid().tolist()
    found_B = []
    for scores_Q, boxes_Q4, query_Q, post, masks in zip(scores_BQ, boxes_BQ4, query_BQ, posts_B, masks_B, strict=True):
        post, num = post if masks else post.without_masks(), int((scores_Q >= post.threshold).sum())
        scores_N, boxes_N4 = scores_Q[:num], boxes_Q4[:num]
        selection = None if post.needs_masks and num else select(scores_N, _xyxy(boxes_N4), None, post)
        found_B.append(_Candidates(post, scores_N, boxes_N4, query_Q[:num], selection))
    logits_B = _mask_logits(found_B, masks_B, mask_head)
    for (post, scores_N, boxes_N4, _, selection), logits_NHW, presence in zip(
        found_B, logits_B, presence_B, strict=True
    ):
        if selection is None:
            selection = select(scores_N, _xyxy(boxes_N4), logits_NHW, post)
            logits_NHW = selection.mask_logits_NHW
        yield Kept(
            presence,
            scores_N[selection.index_N].numpy(),
            boxes_N4[selection.index_N].numpy(),
            None if logits_NHW is None else logits_NHW.cpu().float().numpy(),
            selection.is_merged_N,
            len(scores_N),
        )


def _mask_logits(
    found_B: Sequence[_Candidates], masks_B: Sequence[bool], mask_head: Callable[[list[int]], MaskLogits]
) -> Iterator[Tensor | None]:
    """Mask logits (N, h, w) of what was selected, or of all that it takes to select; None for no masks."""
    query_of = {
        b: found.query_N if found.selection is None else found.query_N[found.selection.index_N]
        for b, (found, masks) in enumerate(zip(found_B, masks_B, strict=True))
        if masks and len(found.query_N)
    }
    logits_of = mask_head(list(query_of)) if query_of else None
    made: dict[int, Tensor] = {}
    for b in range(len(found_B)):
        if logits_of and b in query_of and b not in made:
            group = _fit(query_of, b)
            b_index_M = torch.tensor([row for row in group for _ in query_of[row]])
            logits_MHW = logits_of(b_index_M, torch.cat([query_of[row] for row in group]))
            if all(found_B[row].selection for row in group):
                logits_MHW = logits_MHW.cpu()
            made = dict(zip(group, logits_MHW.split([len(query_of[row]) for row in group]), strict=True))
        yield made.get(b)


def _fit(query_of: dict[int, Tensor], first: int) -> list[int]:
    """Find queries from the first one on whose masks are made together."""
    group: list[int] = []
    num = 0
    for b, query_N in query_of.items():
        if b >= first:
            num += len(query_N)
            if group and num > MASKS_AT_ONCE:
                break
            group.append(b)
    return group


def to_instances(prompt: str, size_hw: tuple[int, int], kept: Kept) -> Instances:
    """Bring kept detections to the original image: masks as RLE, boxes in pixels."""
    masks = [] if kept.mask_logits_NHW is None else [encode_logits(mask, size_hw) for mask in kept.mask_logits_NHW]
    boxes_xyxy = _to_pixels(kept.boxes_cxcywh_N4, size_hw)
    for row in np.flatnonzero(kept.is_merged_N):
        boxes_xyxy[row] = rle_box_xyxy(masks[row])
    return Instances(prompt, kept.presence, size_hw, kept.scores_N, boxes_xyxy, masks, kept.num_before_nms)


def _xyxy(boxes_cxcywh: Tensor) -> Tensor:
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _to_pixels(boxes_cxcywh: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) relative to the model's input, which the whole image fills -> xyxy pixels within the image."""
    height, width = size_hw
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    xyxy = np.concatenate([centre - half, centre + half], axis=1).clip(0, 1)
    return (xyxy * (width, height, width, height)).astype(np.float32)
