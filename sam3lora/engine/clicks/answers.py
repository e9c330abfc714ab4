"""`ClickPrompt`s to a click head, and its `ClickAnswer`s: what the engine, evaluations and training ask in one way.

Shapes: `N` objects decoded together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.transfers import upload

if TYPE_CHECKING:
    from sam3lora.model.clicks.head import ClickFeatures, ClickHead, ClickOutput

MAX_OBJECTS = 16
"""Objects that are decoded together: each takes some 30 MB at 1008 pixels, in training some 130 MB."""


def groups_of_kind(prompts: Sequence[ClickPrompt], order: Iterable[int]) -> Iterator[list[int]]:
    """Indexes of prompts that may pass the head together, at most `MAX_OBJECTS`, each in the given order."""
    of_kind: dict[tuple[int, bool, bool, bool], list[int]] = {}
    for index in order:
        of_kind.setdefault(prompts[index].kind, []).append(index)
    for indexes in of_kind.values():
        for start in range(0, len(indexes), MAX_OBJECTS):
            yield indexes[start : start + MAX_OBJECTS]


def decode_prompts(head: ClickHead, features: ClickFeatures, prompts: Sequence[ClickPrompt]) -> ClickOutput:
    """What the head says to prompts of one kind.

    Args:
        features: With a row for each prompt.
    """
    device = features.coarse.device
    num_clicks, _, _, multimask = prompts[0].kind
    boxes = [one.box_xyxy for one in prompts if one.box_xyxy is not None]
    masks = [one.mask_mm.float() for one in prompts if one.mask_mm is not None]
    return head.decode(
        features,
        points_NK2=upload(np.stack([one.points_k2 for one in prompts]), device) if num_clicks else None,
        labels_NK=upload(np.stack([one.labels_k for one in prompts]), device) if num_clicks else None,
        boxes_N4=upload(np.stack(boxes), device) if boxes else None,
        masks_Nmm=upload(torch.stack(masks), device) if masks else None,
        multimask=multimask,
    )


def answer_prompts(head: ClickHead, features: ClickFeatures, prompts: Sequence[ClickPrompt]) -> list[ClickAnswer]:
    """Answers to prompts about one image, with logits on the host.

    Args:
        features: Of the image alone.
    """
    answers: dict[int, ClickAnswer] = {}
    for indexes in groups_of_kind(prompts, range(len(prompts))):
        image_N = torch.zeros(len(indexes), dtype=torch.long, device=features.coarse.device)
        output = decode_prompts(head, features.of_objects(image_N), [prompts[index] for index in indexes])
        scores_NM, there_N = output.iou_NM.tolist(), output.object_N.sigmoid().tolist()
        for of_one in zip(indexes, output.logits_NMmm.cpu(), scores_NM, there_N, strict=True):
            answers[of_one[0]] = ClickAnswer.of(*of_one[1:])
    return [answers[index] for index in range(len(prompts))]
