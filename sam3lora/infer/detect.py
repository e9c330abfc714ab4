"""Detections of many prompts in a batch of images: one vision pass, masks of the kept object queries only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from sam3lora.model.forward import Detections, StagedSam3, TextFeatures
from sam3lora.model.tokenization import tokenize

TextCache = dict[str, TextFeatures]
"""Prompt -> its features (P = 1). Valid for one state of the weights: start a new one after a training step."""


@dataclass
class Instances:
    """What was found for one prompt in one image, by descending score.

    Attributes:
        prompt: The prompt.
        presence: Probability in [0, 1] that the image shows the prompt at all.
        size_hw: Size of the original image in pixels.
        scores: float32 (N,), sigmoid(logit) x sigmoid(presence), in [0, 1].
        boxes_xyxy: float32 (N, 4) in pixels of the original image.
        masks: N compressed RLEs `{"size": [height, width], "counts": str}` at the original size, ready for JSON.
    """

    prompt: str
    presence: float
    size_hw: tuple[int, int]
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    masks: list[dict[str, Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.scores)


@torch.no_grad()
def detect_prompts(
    staged: StagedSam3,
    tokenizer: Any,
    pixel_values_ICHW: Tensor,
    prompts: Sequence[str],
    *,
    sizes_hw: Sequence[tuple[int, int]],
    score_threshold: float = 0.0,
    max_detections: int = 100,
    max_prompts_per_forward: int = 8,
    text_cache: TextCache | None = None,
) -> list[list[Instances]]:
    """Ask every prompt of every image.

    The vision tower runs once for the batch; (image, prompt) pairs then go through the detector a few at a time, and
    masks are brought to the original size and encoded one by one, so memory does not grow with prompts or detections.

    Args:
        staged: The model, in evaluation mode.
        tokenizer: The base model's tokenizer.
        pixel_values_ICHW: Normalised images on the model's device.
        prompts: Non-empty texts.
        sizes_hw: Height and width of each original image in pixels.
        score_threshold: Lowest score kept; 0 keeps all, which mAP needs.
        max_detections: Most detections of a prompt in an image; the best ones stay.
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
    vision = staged.encode_images(pixel_values_ICHW)
    pairs = [(image, prompt) for image in range(len(sizes_hw)) for prompt in range(len(prompts))]
    for start in range(0, len(pairs), max_prompts_per_forward):
        chunk = pairs[start : start + max_prompts_per_forward]
        image_index_B, text_index_B = torch.tensor(chunk, device=device).unbind(1)
        detections = staged.detect(vision, text, image_index_B, text_index_B)
        kept = _keep(staged, detections, score_threshold, max_detections)
        for (image, prompt), query in zip(chunk, kept, strict=True):
            found[image].append(_instances(prompts[prompt], sizes_hw[image], query))
    return found


def encode_logits(logits_HW: Tensor, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Mask logits of any size -> compressed RLE at `size_hw`: enlarged as logits (bilinear), then cut at 0."""
    resized = F.interpolate(logits_HW[None, None].float(), size=tuple(size_hw), mode="bilinear", align_corners=False)
    mask = (resized[0, 0] > 0).cpu().numpy()
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in size_hw], "counts": rle["counts"].decode("ascii")}


def _text_features(
    staged: StagedSam3, tokenizer: Any, prompts: Sequence[str], cache: TextCache, device: torch.device
) -> TextFeatures:
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
    if missing:
        input_ids, attention_mask = tokenize(tokenizer, missing)
        features = staged.encode_text(input_ids.to(device), attention_mask.to(device))
        for row, prompt in enumerate(missing):
            cache[prompt] = TextFeatures(features.embeds_PTC[row : row + 1], features.mask_PT[row : row + 1])
    rows = [cache[prompt] for prompt in prompts]
    return TextFeatures(torch.cat([row.embeds_PTC for row in rows]), torch.cat([row.mask_PT for row in rows]))


class _Kept(NamedTuple):
    """The kept object queries of one find query, by descending score."""

    presence: float
    scores_N: Tensor
    boxes_cxcywh_N4: Tensor
    mask_logits_NHW: Tensor | None


def _keep(staged: StagedSam3, detections: Detections, score_threshold: float, max_detections: int) -> Iterator[_Kept]:
    scores_BQ = detections.scores_BQ()
    presence_B = detections.presence_logits_LB[-1].float().sigmoid().tolist()
    top_BK, query_BK = scores_BQ.topk(min(max_detections, scores_BQ.shape[1]), dim=1)
    num_B = (top_BK >= score_threshold).sum(1).tolist()
    rows = [b for b, num in enumerate(num_B) if num]
    head = staged.mask_head(detections, torch.tensor(rows, device=scores_BQ.device)) if rows else None
    for b, num in enumerate(num_B):
        query_N = query_BK[b, :num]
        logits_NHW = head.instance_logits(torch.full_like(query_N, b), query_N) if head and num else None
        yield _Kept(presence_B[b], top_BK[b, :num], detections.boxes_cxcywh_LBQ4[-1, b, query_N], logits_NHW)


def _instances(prompt: str, size_hw: tuple[int, int], kept: _Kept) -> Instances:
    return Instances(
        prompt=prompt,
        presence=kept.presence,
        size_hw=size_hw,
        scores=kept.scores_N.float().cpu().numpy(),
        boxes_xyxy=_to_pixels(kept.boxes_cxcywh_N4.float().cpu().numpy(), size_hw),
        masks=[] if kept.mask_logits_NHW is None else [encode_logits(mask, size_hw) for mask in kept.mask_logits_NHW],
    )


def _to_pixels(boxes_cxcywh: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) relative to the model's input, which the whole image fills -> xyxy pixels within the image."""
    height, width = size_hw
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    xyxy = np.concatenate([centre - half, centre + half], axis=1).clip(0, 1)
    return (xyxy * (width, height, width, height)).astype(np.float32)
