"""Training of every preset on a GPU, beside stock transformers with PEFT: memory, images/s, time by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from jobs.bench.gpu_cases import GpuCase
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
from sam3lora.engine.graphs.capture import wants_cuda_graphs
from sam3lora.losses import Criterion, Predictions
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.training.forward_sizes import (
    allowed_on_gpu,
    largest_that_fits,
    peak_on_gpu,
    prompt_sizes,
    prompts_on_cpu,
)
from sam3lora.training.graphs.gradient_graphs import GradientGraphs, cuda_gradient_graphs

OURS, CACHED, STOCK = "sam3lora", "sam3lora, trunk cached", "transformers + PEFT"
PROMPTS = 4
"""Of each image."""

Prompts = int | Literal["auto"]


def training_cases(
    model_name: str, device: torch.device, *, presets: Sequence[str], batches: Sequence[int], repeats: int
) -> Iterator[GpuCase]:
    """Rows of each preset and batch, in which at most 1, 8, or as many prompts at a time as fit, are trained.

    Args:
        presets: Names.
        batches: Numbers of images.
        repeats: Steps whose median counts.
    """
    for preset in presets:
        ours = cache(partial(adapted, partial(Training, make_graphs=_graphs(device)), preset, model_name, device))
        stock = cache(partial(adapted, StockTraining, preset, model_name, device))
        for images in sorted(batches):
            ways: list[tuple[str, Prompts]] = [(OURS, "auto")]
            if preset == "light":
                ways.append((CACHED, "auto"))
            if images == min(batches):
                ways.append((OURS, 1))
            if images == max(batches):
                ways.append((OURS, 8))
            for way, prompts in ways:
                case = Case(images, PROMPTS, cached=way == CACHED)
                key = {"preset": preset, "images": images, "way": way, "prompts at a time": prompts}
                yield GpuCase(key, partial(_ours, ours, case, prompts, device, repeats))
            if images == min(batches) and preset != "maximum":
                key = {"preset": preset, "images": images, "way": STOCK, "prompts at a time": "pair by pair"}
                yield GpuCase(key, partial(_stock, stock, Case(images, PROMPTS), device, repeats))
                stock.cache_clear()
        ours.cache_clear()


def _graphs(device: torch.device) -> Callable[[], GradientGraphs] | None:
    """As `sam3lora train` has them: on a GPU, unless the environment says otherwise."""
    return partial(cuda_gradient_graphs, device) if device.type == "cuda" and wants_cuda_graphs(None) else None


def adapted(make: Callable[[Sam3Model, str], Any], preset: str, model_name: str, device: torch.device) -> Any:
    model = random_model(model_name, device=device)
    cast(nn.Module, model.text_encoder).to("cpu")  # frozen: its features of the prompts are kept, and it is sent away
    return make(model, preset)


def _ours(training_of: Callable[[], Training], case: Case, prompts: Prompts, device: torch.device, repeats: int) -> Row:
    training = training_of()
    training.forget_gradients()  # of a case that ran out of memory
    training.staged.forget_graphs()
    forget_peak(device)
    inputs = Inputs.draw(training.staged.model, case, device)
    number = prompts_that_fit(training, inputs) if prompts == "auto" else prompts
    settle = training.staged.runs_to_settle
    row = measured_steps(partial(training.step, inputs, number), case, device, repeats, settle=settle)
    return ({"chosen": number} if prompts == "auto" else {}) | row


def _stock(training_of: Callable[[], StockTraining], case: Case, device: torch.device, repeats: int) -> Row:
    training = training_of()
    forget_peak(device)
    inputs = Inputs.draw(cast(Sam3Model, training.peft.get_base_model()), case, device)
    return measured_steps(partial(training.step, inputs), case, device, repeats)


def prompts_that_fit(training: Training, inputs: Inputs) -> int:
    """What `training.max_prompts_per_forward: auto` chooses; 0 if not even one prompt at a time fits."""
    device = inputs.pixels_ICHW.device
    if device.type != "cuda":
        return min(prompts_on_cpu(inputs.pixels_ICHW.shape[-1]), inputs.num_queries)

    def backward(num_images: int, max_prompts: int) -> None:
        try:
            for _ in range(training.staged.runs_to_settle):
                training.gradients(inputs, max_prompts)
        finally:
            training.staged.forget_graphs()
            training.forget_gradients()

    sizes = prompt_sizes(inputs.num_queries)
    return largest_that_fits(
        [inputs.case.images], sizes, inputs.case.prompts, partial(peak_on_gpu, backward), allowed_on_gpu(1, 1.0)
    )[1]


def measured_steps(
    step: Callable[[Part], Tensor], case: Case, device: torch.device, repeats: int, *, settle: int = 1
) -> Row:
    """The median step of some, after `settle` steps that do not count."""
    watch, whole = Stopwatch(device), Stopwatch(device)
    for _ in range(settle):
        step(nullcontext)
    forget_peak(device)
    rounds = []
    for _ in range(repeats):
        with whole.part("step"):
            loss = step(watch.part)
        rounds.append(watch.milliseconds() | whole.milliseconds())
    parts = medians(rounds)
    return {
        "images/s": 1000 * case.images / parts["step"],
        "peak GB": peak_gb(device),
        **{f"{name} ms": taken for name, taken in parts.items()},
        "loss": float(loss),
    }


class StockTraining:
    """As a careful user of transformers and PEFT writes it: a forward and a backward per (image, prompt).

    The loss is ours, of what the stock forward returns: the last decoder layer, and no one-to-many branch. Text
    features are kept, as ours are.
    """

    def __init__(self, model: Sam3Model, preset: str) -> None:
        lora = Preset.read(preset).lora
        # Without boxes the stock forward leaves the geometry encoder out.
        components = tuple(name for name in lora.components or () if name != "geometry_encoder")
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
            image, prompt = divmod(row, inputs.case.prompts)
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
