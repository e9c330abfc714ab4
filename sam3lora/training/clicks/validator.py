"""How good the masks of a run of task clicks are after one to three clicks, while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from sam3lora.data.images import ImageError
from sam3lora.data.masks import decode_mask
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.evaluation.clicks.meter import ClickMeter, is_measured
from sam3lora.evaluation.clicks.simulated_user import ClickedMask, SimulatedUser, run_objects
from sam3lora.losses.focal_dice import resize
from sam3lora.model.clicks.head import ClickFeatures, ClickHead
from sam3lora.training import distributed
from sam3lora.training.clicks.objects import MAX_OBJECTS
from sam3lora.training.clicks.runner import ClickRunner
from sam3lora.training.validator import Validator

MAX_CLICKS = 3
LOGGED = ("mean_iou_1", "mean_iou_2", "mean_iou_3")


@dataclass
class ClickValidator(Validator):
    """As `Validator`; the metrics are mean IoU after 1, 2 and 3 clicks of the simulated user, at the images' size.

    `clicks.objects_per_image` bounds the objects of an image, of which the first ones are taken.
    """

    model: PeftModel
    runner: ClickRunner

    def metrics(self) -> dict[str, Any]:
        index, config = self.data.valid_complete, self.config
        assert index is not None
        rows = range(len(index))[: config.evaluation.num_samples]
        mine = rows[distributed.rank() :: distributed.world_size()]
        meter = ClickMeter(MAX_CLICKS)
        self.model.eval()
        with torch.no_grad():
            for row in mine:
                self._measure(index.record(row), meter)

        def measure(parts: list[ClickMeter]) -> dict[str, Any]:
            whole = parts[0]
            for part in parts[1:]:
                whole.merge(part)
            values = whole.values()
            return {name: values[name] for name in LOGGED}

        return distributed.on_first_worker(meter, measure)

    def _measure(self, record: Mapping[str, Any], meter: ClickMeter) -> None:
        """Click on the objects of an image."""
        runner, size_hw = self.runner, (record["height"], record["width"])
        users: list[SimulatedUser] = []
        numbers: list[int] = []
        ignored_HW = np.zeros(size_hw, dtype=bool)
        for annotation in record["annotations"]:
            if annotation["iscrowd"]:
                ignored_HW |= decode_mask(annotation["segmentation"], size_hw)
        for number, annotation in enumerate(record["annotations"]):
            if annotation["iscrowd"] or len(users) == self.config.clicks.objects_per_image:
                continue
            truth_HW = decode_mask(annotation["segmentation"], size_hw)
            if is_measured(truth_HW, ignored_HW):
                users.append(SimulatedUser(truth_HW, ignored_HW, max_clicks=MAX_CLICKS))
                numbers.append(number)
        if not users:
            return
        with torch.autocast(runner.device.type, dtype=torch.bfloat16, enabled=runner.bf16):
            try:
                features = runner.images.of_records([record])
            except ImageError:
                if self.config.training.on_bad_image == "stop":
                    raise
                return
            runs = run_objects(users, InteractionsOfImage(runner.head, features, size_hw).answer)
        for number, run in zip(numbers, runs, strict=True):
            meter.add(run, image_id=record["image_id"], object_id=number)


class InteractionsOfImage:
    """What a head answers to simulated users of one image, by the rules of `Interaction`.

    Args:
        features: Of the image alone.
        size_hw: Of the image in pixels.
    """

    def __init__(self, head: ClickHead, features: ClickFeatures, size_hw: tuple[int, int]) -> None:
        self._head, self._features, self._size_hw = head, features, size_hw
        self._now: dict[int, Interaction] = {}

    def answer(self, asked: Sequence[tuple[int, Sequence[Click]]]) -> list[ClickedMask]:
        """For `run_objects`: all of them have the same number of clicks."""
        before = Interaction(self._size_hw, self._head.input_side)
        now = {index: self._now.get(index, before).add(clicks[-1:]) for index, clicks in asked}
        prompts = {index: prompt for index, state in now.items() if (prompt := state.prompt()) is not None}
        indexes, found = list(prompts), []
        for first in range(0, len(indexes), MAX_OBJECTS):
            chunk = indexes[first : first + MAX_OBJECTS]
            for index, answer in zip(chunk, self._decode([prompts[one] for one in chunk]), strict=True):
                self._now[index] = now[index].answered(answer)
                masks_MHW = (resize(answer.logits_Mmm, self._size_hw) > 0).cpu().numpy()
                found.append(ClickedMask(masks_MHW[answer.chosen], masks_MHW, answer.score))
        return found

    def _decode(self, prompts: Sequence[ClickPrompt]) -> list[ClickAnswer]:
        """Answers to prompts of one kind, which have clicks and no box."""
        device = self._features.coarse.device

        def together(arrays: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(device)

        masks = [one.mask_mm for one in prompts if one.mask_mm is not None]
        output = self._head.decode(
            self._features.of_objects(torch.zeros(len(prompts), dtype=torch.long, device=device)),
            points_NK2=together([one.points_k2 for one in prompts]),
            labels_NK=together([one.labels_k for one in prompts]),
            masks_Nmm=torch.stack(masks) if masks else None,
            multimask=prompts[0].multimask,
        )
        scores, there = output.iou_NM.tolist(), output.object_N.sigmoid().tolist()
        return [ClickAnswer.of(*of_one) for of_one in zip(output.logits_NMmm, scores, there, strict=True)]
