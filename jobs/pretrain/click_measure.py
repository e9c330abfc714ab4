"""What the click head of the tiny base reaches on held-out scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.pretrain.click_scenes import ClickScenes, large_objects
from jobs.pretrain.click_stage import as_logits
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.prompt import DRAWN_LOGIT, ClickAnswer, ClickPrompt
from sam3lora.evaluation.clicks.meter import ClickMeter
from sam3lora.evaluation.clicks.next_click import mask_iou, next_click
from sam3lora.evaluation.clicks.simulated_user import MAX_CLICKS, ClickedMask, SimulatedUser, run_objects
from sam3lora.model.clicks.head import ClickFeatures, ClickHead, ClickOutput
from sam3lora.training.clicks.regions import boxes_of


@dataclass(frozen=True)
class ClickReport:
    """Figures over the objects of held-out scenes.

    Attributes:
        clicks: `ClickMeter.values`: NoC, mIoU after k clicks and so on.
        box: Mean IoU of the mask from the object's box.
        right_mask: Of the mask from the right mask and a click into the middle.
        wrong_mask: The same from the inverted mask: how far it is believed against the click.
        ceiling: Of the right mask itself at low resolution.
    """

    objects: int
    clicks: dict[str, float | None]
    box: float
    right_mask: float
    wrong_mask: float
    ceiling: float

    def line(self) -> str:
        """The main figures."""
        values = {name: self.clicks[name] for name in self.clicks if name.startswith(("noc_85", "mean_iou", "oracle"))}
        values |= {"box": self.box, "right_mask": self.right_mask, "wrong_mask": self.wrong_mask}
        return " ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)


@torch.inference_mode()
def measure_clicks(
    head: ClickHead, scenes: ClickScenes, *, num_scenes: int | None = None, max_clicks: int = MAX_CLICKS
) -> ClickReport:
    """Click on every object of the first scenes (None: all) as the simulated user does."""
    meter, others = ClickMeter(max_clicks), []
    for row in range(len(scenes) if num_scenes is None else num_scenes):
        labels_HW = np.asarray(scenes.bank.labels[row])
        truths = [labels_HW == number for number in large_objects(labels_HW)]
        if not truths:
            continue
        features = head.embed(scenes.tokens_ISC[row : row + 1].float())
        user = _Scene(head, features, labels_HW.shape)
        users = [SimulatedUser(truth_HW, max_clicks=max_clicks) for truth_HW in truths]
        for number, run in enumerate(run_objects(users, user.answer)):
            meter.add(run, image_id=row, object_id=number)
        others.append(_other_prompts(head, features, truths))
    means = np.concatenate(others).mean(0)
    return ClickReport(len(meter.runs), meter.values(), *(round(float(value), 4) for value in means))


class _Scene:
    """The interactions of one scene's objects."""

    def __init__(self, head: ClickHead, features: ClickFeatures, size_hw: tuple[int, ...]) -> None:
        self._head, self._features, self._size_hw = head, features, (size_hw[0], size_hw[1])
        self._now: dict[int, Interaction] = {}

    def answer(self, asked: Sequence[tuple[int, Sequence[Click]]]) -> list[ClickedMask]:
        """All of them have the same number of clicks."""
        first = Interaction(self._size_hw, self._head.input_side)
        now = [self._now.get(index, first).add(clicks[-1:]) for index, clicks in asked]
        prompts = [one.prompt() for one in now]
        output = _ask(self._head, self._features, [one for one in prompts if one is not None])
        answers = [
            ClickAnswer.of(logits, iou.tolist(), float(there.sigmoid()))
            for logits, iou, there in zip(output.logits_NMmm, output.iou_NM, output.object_N, strict=True)
        ]
        for (index, _), state, answer in zip(asked, now, answers, strict=True):
            self._now[index] = state.answered(answer)
        return [
            ClickedMask(masks[answer.chosen], masks if len(masks) > 1 else None, answer.score)
            for answer in answers
            for masks in [_masks(answer.logits_Mmm, self._size_hw)]
        ]


def _ask(head: ClickHead, features: ClickFeatures, prompts: Sequence[ClickPrompt]) -> ClickOutput:
    """Prompts of one kind about one image."""
    masks = [one.mask_mm for one in prompts if one.mask_mm is not None]
    return head.decode(
        features.of_objects(torch.zeros(len(prompts), dtype=torch.long)),
        points_NK2=torch.from_numpy(np.stack([one.points_k2 for one in prompts])),
        labels_NK=torch.from_numpy(np.stack([one.labels_k for one in prompts])),
        masks_Nmm=torch.stack(masks) if masks else None,
        multimask=prompts[0].multimask,
    )


def _masks(logits_Nmm: Tensor, size_hw: tuple[int, int]) -> np.ndarray:
    resized = F.interpolate(logits_Nmm[:, None], size=size_hw, mode="bilinear", align_corners=False)[:, 0]
    return (resized > 0).numpy()


def _other_prompts(head: ClickHead, features: ClickFeatures, truths: Sequence[np.ndarray]) -> np.ndarray:
    """IoU (N, 4) from a box, from the right mask and a click, from the inverted one and it, and of the right mask."""
    size_hw = (truths[0].shape[0], truths[0].shape[1])
    truth_NHW = torch.from_numpy(np.stack(truths))
    rows = features.of_objects(torch.zeros(len(truths), dtype=torch.long))
    middles = [next_click(truth, np.zeros_like(truth)) for truth in truths]
    points = torch.tensor([[(one.x, one.y)] for one in middles if one is not None], dtype=torch.float32)
    points = points * head.input_side / size_hw[1]
    boxes = boxes_of(truth_NHW) * head.input_side / size_hw[1]
    right_Nmm = as_logits(truth_NHW, head.mask_side, DRAWN_LOGIT)
    clicked = {"points_NK2": points, "labels_NK": torch.ones(len(truths), 1, dtype=torch.long)}
    found = [
        head.decode(rows, boxes_N4=boxes, multimask=False).logits_NMmm[:, 0],
        head.decode(rows, **clicked, masks_Nmm=right_Nmm, multimask=False).logits_NMmm[:, 0],
        head.decode(rows, **clicked, masks_Nmm=-right_Nmm, multimask=False).logits_NMmm[:, 0],
        right_Nmm,
    ]
    columns = [
        [mask_iou(truth, mask) for truth, mask in zip(truths, _masks(logits, size_hw), strict=True)] for logits in found
    ]
    return np.array(columns).T
