"""Detections of many prompts in a batch of images: one vision pass, masks of the kept object queries only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam3lora.infer.mask_encoding import Rle, encode_logits, rle_area_px, rle_box_xyxy
from sam3lora.infer.postprocess import PostProcessing, select
from sam3lora.model.forward import Detections, StagedSam3, TextFeatures, VisionFeatures
from sam3lora.model.tokenization import tokenize

TextCache = dict[str, TextFeatures]
"""Prompt -> its features (P = 1). Valid for one state of the weights: start a new one after a training step."""

EVERYTHING = PostProcessing(threshold=0.0, nms="none")
"""The best 100 object queries as they are."""

PADDING_LABEL = -10


@dataclass
class Instances:
    """What was found for one prompt in one image, by descending score.

    Attributes:
        prompt: The prompt.
        presence: Probability in [0, 1] that the image shows the prompt at all.
        size_hw: Size of the original image in pixels.
        scores: float32 (N,), sigmoid(logit) x sigmoid(presence), in [0, 1].
        boxes_xyxy: float32 (N, 4) in pixels of the original image.
        masks: N compressed RLEs `{"size": [height, width], "counts": str}` at the original size, ready for JSON; empty
            if masks were not wanted.
        num_before_nms: How many there were at the threshold before merging, suppression and the limit.
    """

    prompt: str
    presence: float
    size_hw: tuple[int, int]
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    masks: list[Rle] = field(repr=False)
    num_before_nms: int = 0

    def __len__(self) -> int:
        return len(self.scores)

    def areas_px(self) -> list[int]:
        """Pixels of each mask."""
        return [rle_area_px(mask) for mask in self.masks]


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
        kept = _keep(staged, detections, post, masks)
        for (image, prompt), query in zip(chunk, kept, strict=True):
            found[image].append(_instances(prompts[prompt], sizes_hw[image], query))
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


class _Kept(NamedTuple):
    """The kept detections of one find query, by descending score, on the CPU."""

    presence: float
    scores_N: np.ndarray
    boxes_cxcywh_N4: np.ndarray
    mask_logits_NHW: np.ndarray | None
    is_merged_N: np.ndarray
    num_before_nms: int


def _keep(staged: StagedSam3, detections: Detections, post: PostProcessing, masks: bool) -> Iterator[_Kept]:
    """One find query after the other, so that the masks of one are in memory at a time."""
    scores_BQ, query_BQ = detections.scores_BQ().sort(dim=1, descending=True, stable=True)
    presence_B = detections.presence_logits_LB[-1].float().sigmoid().tolist()
    num_B = (scores_BQ >= post.threshold).sum(1).tolist()
    post = post if masks else post.without_masks()
    rows = [b for b, num in enumerate(num_B) if num and masks]
    head = staged.mask_head(detections, torch.tensor(rows, device=scores_BQ.device)) if rows else None
    for b, num in enumerate(num_B):
        query_N, scores_N = query_BQ[b, :num], scores_BQ[b, :num]
        boxes_N4 = detections.boxes_cxcywh_LBQ4[-1, b, query_N].float()
        logits_NHW = None
        if head is not None and num and post.needs_masks:
            logits_NHW = head.instance_logits(torch.full_like(query_N, b), query_N)
        selection = select(scores_N, _xyxy(boxes_N4), logits_NHW, post)
        logits_NHW = selection.mask_logits_NHW
        if head is not None and num and logits_NHW is None:
            query_N = query_N[selection.index_N]
            logits_NHW = head.instance_logits(torch.full_like(query_N, b), query_N)
        yield _Kept(
            presence_B[b],
            scores_N[selection.index_N].cpu().numpy(),
            boxes_N4[selection.index_N].cpu().numpy(),
            None if logits_NHW is None else logits_NHW.float().cpu().numpy(),
            selection.is_merged_N,
            num,
        )


def _instances(prompt: str, size_hw: tuple[int, int], kept: _Kept) -> Instances:
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
