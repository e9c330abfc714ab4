"""How good the masks of a run of task clicks are after one to three clicks, while it trains."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel

from sam3lora.data.images import ImageError
from sam3lora.data.masks import encode_mask_at
from sam3lora.engine.clicks.answers import answer_prompts
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.evaluation.clicks.asking import ImageInteractions
from sam3lora.evaluation.clicks.meter import ClickMeter, is_measured
from sam3lora.evaluation.clicks.simulated_user import MAX_CLICKS, SimulatedUser, run_objects
from sam3lora.evaluation.clicks.true_objects import ignored_region
from sam3lora.model.clicks.head import ClickFeatures, ClickHead
from sam3lora.training.clicks.runner import ClickRunner
from sam3lora.training.validator import Validator, values_of_all

CLICKS = 3
"""Clicks on each object, where `best/` is chosen by nothing that takes more."""


@dataclass
class ClickValidator(Validator):
    """As `Validator`; the metrics are those of `ClickMeter`, from clicks of the simulated user at the images' size.

    `clicks.objects_per_image` bounds the objects of an image, of which the first ones are taken.
    """

    measures_base: ClassVar[bool] = True

    model: PeftModel
    runner: ClickRunner

    def metrics(self) -> dict[str, Any]:
        """Mean IoU after 1, 2, 3 clicks and so on, and NoC where up to 20 clicks are made."""
        num_clicks = clicks_of(self.config.evaluation.best_metric)
        meter = ClickMeter(num_clicks)
        self.model.eval()
        with torch.no_grad():
            for [record] in self.my_records():
                self._measure(record, meter)
        kinds = ("mean_iou_", "noc_") if num_clicks == MAX_CLICKS else ("mean_iou_",)
        return {name: value for name, value in values_of_all(meter).items() if name.startswith(kinds)}

    def _measure(self, record: Mapping[str, Any], meter: ClickMeter) -> None:
        """Click on the objects of an image."""
        runner = self.runner
        users = users_of(record, meter.max_clicks, self.config.clicks.objects_per_image)
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


def clicks_of(metric: str) -> int:
    """Clicks on each object that a metric needs.

    >>> [clicks_of(metric) for metric in ("mean_iou_1", "mean_iou_8", "noc_85", "valid_loss")]
    [3, 8, 20, 3]
    """
    if metric.startswith("noc_"):
        return MAX_CLICKS
    name, _, number = metric.rpartition("_")
    return max(CLICKS, int(number)) if name == "mean_iou" else CLICKS


def users_of(record: Mapping[str, Any], max_clicks: int, max_objects: int) -> dict[int, SimulatedUser]:
    """A user for each of the first objects of an image that are large enough, by their position in the record."""
    size_hw = (record["height"], record["width"])
    ignored = ignored_region(record)
    users: dict[int, SimulatedUser] = {}
    for number, annotation in enumerate(record["annotations"]):
        if annotation["iscrowd"] or len(users) == max_objects:
            continue
        truth = encode_mask_at(annotation["segmentation"], size_hw)
        if truth is not None and is_measured(truth, ignored):
            users[number] = SimulatedUser(truth, ignored, max_clicks=max_clicks)
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
