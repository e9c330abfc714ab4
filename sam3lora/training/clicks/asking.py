"""Prompts to the click head and back: what it answers, and which of its masks goes on."""

from __future__ import annotations

from torch import Tensor

from sam3lora.model.clicks.head import ClickFeatures, ClickHead, ClickOutput
from sam3lora.training.clicks.sampling import Prompts


def ask(head: ClickHead, features: ClickFeatures, prompts: Prompts) -> ClickOutput:
    """What the head answers to prompts; `features` have a row for each object."""
    has_points = prompts.points_Nk2.shape[1] > 0
    return head.decode(
        features,
        points_NK2=prompts.points_Nk2 if has_points else None,
        labels_NK=prompts.labels_Nk if has_points else None,
        boxes_N4=prompts.boxes_xyxy_N4,
        masks_Nmm=prompts.masks_Nhw,
        multimask=prompts.multimask,
    )


def best_masks(output: ClickOutput) -> Tensor:
    """Of each object the logits (N, m, m) of the mask that the head thinks best, without gradient."""
    best_N11 = output.iou_NM.argmax(dim=1)[:, None, None, None]
    return output.logits_NMmm.detach().take_along_dim(best_N11, dim=1)[:, 0]
