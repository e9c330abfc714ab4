"""What the click head of the tiny base reaches on held-out scenes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jobs.pretrain.click_scenes import ClickScenes, large_objects
from sam3lora.data.rle import encode_rle
from sam3lora.engine.clicks.answers import answer_prompts
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt, drawn_mask_logits
from sam3lora.evaluation.clicks.asking import ImageInteractions
from sam3lora.evaluation.clicks.meter import ClickMeter
from sam3lora.evaluation.clicks.next_click import mask_iou, next_click
from sam3lora.evaluation.clicks.simulated_user import MAX_CLICKS, SimulatedUser, run_objects
from sam3lora.losses.focal_dice import resize
from sam3lora.model.clicks.head import ClickHead
from sam3lora.training.clicks.regions import boxes_of

Ask = Callable[[Sequence[ClickPrompt]], Sequence[ClickAnswer]]


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
def measure_click_head(
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
        ask = functools.partial(answer_prompts, head, features)
        scene = Interaction((labels_HW.shape[0], labels_HW.shape[1]), head.input_side)
        users = [SimulatedUser(encode_rle(truth_HW), max_clicks=max_clicks) for truth_HW in truths]
        interactions = ImageInteractions(ask, [scene] * len(users))
        for number, run in enumerate(run_objects(users, interactions.answer)):
            meter.add(run, image_id=row, object_id=number)
        others.append(_other_prompts(ask, scene, head.mask_side, truths))
    means = np.concatenate(others).mean(0)
    return ClickReport(len(meter.runs), meter.values(), *(round(float(value), 4) for value in means))


def _other_prompts(ask: Ask, scene: Interaction, mask_side: int, truths: Sequence[np.ndarray]) -> np.ndarray:
    """IoU (N, 4) from a box, from the right mask and a click, from the inverted one and it, and of the right mask."""
    size_hw, truth_NHW = scene.size_hw, torch.from_numpy(np.stack(truths))
    of_scene = functools.partial(ClickPrompt.of, size_hw=size_hw, side=scene.side)
    right_Nmm = drawn_mask_logits(truth_NHW, mask_side)
    prompts = []
    for truth_HW, box, right_mm in zip(truths, boxes_of(truth_NHW).tolist(), right_Nmm, strict=True):
        middle = next_click(encode_rle(truth_HW), encode_rle(np.zeros_like(truth_HW)))
        assert middle is not None, "an object has a pixel"
        prompts += [of_scene((), box), of_scene([middle], None, right_mm), of_scene([middle], None, -right_mm)]
    answers = torch.stack([answer.mask_mm for answer in ask(prompts)]).unflatten(0, (len(truths), 3))
    found_N4mm = torch.cat([answers, right_Nmm[:, None]], dim=1)
    return np.array(
        [
            [mask_iou(encode_rle(truth), encode_rle(mask)) for mask in resize(logits_4mm, size_hw).numpy() > 0]
            for truth, logits_4mm in zip(truths, found_N4mm, strict=True)
        ]
    )
