"""How good the masks of a run of task clicks are after one to three clicks, while it trains."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from sam3lora.data.images import ImageError
from sam3lora.data.masks import decode_mask
from sam3lora.engine.clicks.answers import answer_prompts
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.evaluation.clicks.asking import ImageInteractions
from sam3lora.evaluation.clicks.meter import ClickMeter, is_measured
from sam3lora.evaluation.clicks.simulated_user import SimulatedUser, run_objects
from sam3lora.model.clicks.head import ClickFeatures, ClickHead
from sam3lora.training import distributed
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
        runner = self.runner
        users = users_of(record, MAX_CLICKS, self.config.clicks.objects_per_image)
        if not users:
            return
        with torch.autocast(runner.device.type, dtype=torch.bfloat16, enabled=runner.bf16):
            try:
                features = runner.images.of_records([record])
            except ImageError:
                if self.config.training.on_bad_image == "stop":
                    raise
                return
            click_on(users, runner.head, features, record, meter)


def users_of(record: Mapping[str, Any], max_clicks: int, max_objects: int) -> dict[int, SimulatedUser]:
    """A user for each of the first objects of an image that are large enough, by their position in the record."""
    size_hw = (record["height"], record["width"])
    ignored_HW = np.zeros(size_hw, dtype=bool)
    for annotation in record["annotations"]:
        if annotation["iscrowd"]:
            ignored_HW |= decode_mask(annotation["segmentation"], size_hw)
    users: dict[int, SimulatedUser] = {}
    for number, annotation in enumerate(record["annotations"]):
        if annotation["iscrowd"] or len(users) == max_objects:
            continue
        truth_HW = decode_mask(annotation["segmentation"], size_hw)
        if is_measured(truth_HW, ignored_HW):
            users[number] = SimulatedUser(truth_HW, ignored_HW, max_clicks=max_clicks)
    return users


def click_on(
    users: Mapping[int, SimulatedUser],
    head: ClickHead,
    features: ClickFeatures,
    record: Mapping[str, Any],
    meter: ClickMeter,
) -> None:
    """Let the users of an image click until they are done, and measure what comes of it.

    Args:
        features: Of the image alone.
    """
    start = Interaction((record["height"], record["width"]), head.input_side)
    interactions = ImageInteractions(functools.partial(answer_prompts, head, features), [start] * len(users))
    for number, run in zip(users, run_objects(list(users.values()), interactions.answer), strict=True):
        meter.add(run, image_id=record["image_id"], object_id=number)
