"""Training of every preset on a GPU, beside stock transformers with PEFT: memory, images/s, time by part."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from jobs.bench.gpu_timing import Row, Stopwatch, forget_peak, medians, peak_gb
from jobs.bench.gpu_training import (
    Case,
    Inputs,
    Part,
    Preset,
    Training,
    make_optimizer,
    train_adapter_alone,
    update,
)
from jobs.bench.models import random_model
from sam3lora.losses import Criterion, Predictions
from sam3lora.model.adapter.lora_layers import apply_lora


def measure_training(
    model_name: str,
    device: torch.device,
    *,
    presets: Sequence[str] = ("light", "balanced", "full", "maximum"),
    batches: Sequence[int] = (1, 2, 4),
    prompts: int = 4,
    repeats: int = 5,
) -> list[Row]:
    """A row for each preset and batch, ours and the plain way; where memory runs out the row says so."""
    rows = []
    for preset in presets:
        for images in batches:
            ways: list[tuple[str, type[Training | StockTraining], bool]] = [("sam3lora", Training, False)]
            if preset == "light":
                ways.append(("sam3lora, trunk cached", Training, True))
            if preset in ("light", "full"):
                ways.append(("transformers + PEFT", StockTraining, False))
            for name, make, cached in ways:
                case = Case(preset, images, prompts, cached=cached)
                rows.append(
                    {
                        "preset": preset,
                        "images": images,
                        "way": name,
                        **_measure(make, case, model_name, device, repeats),
                    }
                )
    return rows


def _measure(
    make: type[Training | StockTraining], case: Case, model_name: str, device: torch.device, repeats: int
) -> Row:
    forget_peak(device)
    try:
        return _steps(make, case, model_name, device, repeats)
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}


def _steps(
    make: type[Training | StockTraining], case: Case, model_name: str, device: torch.device, repeats: int
) -> Row:
    model = random_model(model_name, device=device)
    cast(nn.Module, model.text_encoder).to("cpu")  # frozen: its features of the prompts are kept, and it is sent away
    training, inputs, watch = make(model, case), Inputs.draw(model, case, device), Stopwatch(device)
    for _ in range(2):
        training.step(inputs)
    forget_peak(device)
    rounds, whole = [], Stopwatch(device)
    for _ in range(repeats):
        with whole.part("step"):
            loss = training.step(inputs, watch.part)
        rounds.append(watch.milliseconds() | whole.milliseconds())
    parts = medians(rounds)
    return {
        "peak GB": peak_gb(device),
        "images/s": 1000 * case.images / parts["step"],
        **{f"{name} ms": taken for name, taken in parts.items()},
        "loss": float(loss),
    }


class StockTraining:
    """As a careful user of transformers and PEFT writes it: a forward and a backward per (image, prompt).

    The loss is ours, of what the stock forward returns: the last decoder layer, and no one-to-many branch. Text
    features are kept, as ours are.
    """

    def __init__(self, model: Sam3Model, case: Case) -> None:
        lora = Preset.read(case.preset).lora
        # Without boxes the stock forward leaves the geometry encoder out.
        components = tuple(name for name in lora.components or () if name != "geometry_encoder")
        self.case = case
        self.peft = apply_lora(model, lora.model_copy(update={"components": components}), geometry_cls=False)
        train_adapter_alone(self.peft)
        self.parameters = [parameter for parameter in self.peft.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self.parameters)
        self._criterion = Criterion(touch_unused=False)

    def step(self, inputs: Inputs, part: Part = nullcontext) -> Tensor:
        """One update of the adapter; the loss."""
        device, normalizer = inputs.pixels_ICHW.device, inputs.normalizer()
        total = torch.zeros((), device=device)
        for row in range(inputs.num_queries):
            image, prompt = divmod(row, self.case.prompts)
            with part("forward"), torch.autocast(device.type, dtype=torch.bfloat16):
                output = self.peft(
                    pixel_values=inputs.pixels_ICHW[image : image + 1],
                    text_embeds=BaseModelOutputWithPooling(pooler_output=inputs.text.embeds_PTC[prompt : prompt + 1]),
                    attention_mask=inputs.text.mask_PT[prompt : prompt + 1],
                )
            with part("loss"):
                targets = inputs.targets(slice(row, row + 1))
                loss = self._criterion(_stock_predictions(output), targets, normalizer).total
            with part("backward"):
                loss.backward()
            total += loss.detach()
            del output, loss
        with part("optimizer"):
            update(self._optimizer, self.parameters)
        return total


def _stock_predictions(output: Any) -> Predictions:
    corners = output.pred_boxes.float()
    boxes = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1)
    return Predictions(
        logits_LBQ=output.pred_logits[None],
        boxes_cxcywh_LBQ4=boxes[None],
        presence_logits_LB=output.presence_logits.reshape(1, -1),
        mask_logits=lambda _, b_index, q_index: output.pred_masks[b_index, q_index],
        semantic_logits=lambda b_index: output.semantic_seg[b_index, 0],
    )
