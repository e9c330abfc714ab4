"""Many prompts on one image: one vision pass for all of them, against a run of the whole model for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers import AutoTokenizer, Sam3ImageProcessor, Sam3Model

from jobs.bench.models import random_model
from jobs.bench.report import BenchReport, Timing, time_in_turns
from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import Detections
from sam3lora.engine.forward import MixedForward, Row
from sam3lora.engine.selection import Wanted
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.staged.forward import StagedSam3, VisionFeatures
from sam3lora.model.tiny import TINY_FOLDER
from sam3lora.model.tokenization import tokenize

SIZE_HW = (720, 960)
"""Of the image that detections are brought back to."""

KEPT = 0.1
"""Share of the object queries above the threshold."""


@torch.no_grad()
def compare_prompts(
    model_name: str | None = None, *, num_prompts: int = 8, repeats: int = 3, device: torch.device | str | None = None
) -> BenchReport:
    """Time `num_prompts` prompts on one image, from normalised pixels to masks at the size of the image.

    The plain way is the stock `Sam3Model.forward` and transformers' `post_process_instance_segmentation`, a prompt at a
    time; its processor is not counted, nor is bringing its masks from a GPU. Ours makes run-length codes as well. All
    ways leave out the geometry CLS token, as the stock forward does, and keep the same object queries. On a GPU all run
    under bfloat16 autocast.

    Args:
        model_name: A configuration, filled with random weights: "tiny", "small", or "facebook/sam3" (1008 pixels);
            None takes the last on a GPU and "small" elsewhere.
        num_prompts: Prompts to ask.
        repeats: Rounds; the median counts.
        device: None takes a GPU if there is one.

    Raises:
        UserError: No such configuration.
    """
    model_name, device = _choose(model_name, device)
    model, tokenizer, pixel_values, prompts = _work(model_name, num_prompts, device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        threshold = _threshold(model, tokenizer, pixel_values, prompts)
        ours = partial(_ours, model, tokenizer, pixel_values, threshold)
        plain = partial(_plain, model, tokenizer, pixel_values, threshold)
        agreement = _agreement(ours(prompts), plain(prompts))
        parts = {
            "vision": lambda: model.vision_encoder(pixel_values),
            "forward": lambda: _forward(model, tokenizer, {"pixel_values": pixel_values}, prompts[0]),
        }
        share = time_in_turns(parts, repeats, device)
        ways = {
            f"sam3lora, {num_prompts} prompts at once": lambda: ours(prompts),
            f"transformers, {num_prompts} x 1 prompt": lambda: plain(prompts),
            "transformers, the image encoded once by hand": lambda: plain(prompts, by_hand=True),
            f"sam3lora, {num_prompts} x 1 prompt": lambda: [ours([prompt]) for prompt in prompts],
        }
        seconds = time_in_turns(ways, repeats, device)
    side = model.config.image_size
    return BenchReport(
        title=f"{num_prompts} prompts on one image, {model_name} with random weights at {side} pixels",
        ways=[Timing(name, value) for name, value in seconds.items()],
        facts={
            "device": device.type,
            "precision": "bfloat16 autocast" if device.type == "cuda" else "float32",
            "vision share of a single-prompt forward": round(share["vision"] / share["forward"], 3),
            **agreement,
        },
    )


@torch.no_grad()
def compare_repeated(
    model_name: str | None = None, *, num_prompts: int = 8, repeats: int = 3, device: torch.device | str | None = None
) -> BenchReport:
    """Time the same prompts on an image whose vision features are kept, beside the first time that it is asked about.

    Args and Raises: As `compare_prompts`.
    """
    model_name, device = _choose(model_name, device)
    model, tokenizer, pixel_values, prompts = _work(model_name, num_prompts, device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        threshold = _threshold(model, tokenizer, pixel_values, prompts)
        kept = StagedSam3(model, geometry_cls=False).encode_images(pixel_values)
        first = partial(_ours, model, tokenizer, pixel_values, threshold, prompts)
        again = partial(first, vision=kept)
        num_first, num_again = (sum(map(len, ask())) for ask in (first, again))
        seconds = time_in_turns({"image features kept": again, "first time": first}, repeats, device)
    return BenchReport(
        title=f"{num_prompts} prompts on an image asked about again, {model_name} with random weights",
        ways=[Timing(name, value) for name, value in seconds.items()],
        facts={"detections, first time": num_first, "detections, features kept": num_again},
    )


def _choose(model_name: str | None, device: torch.device | str | None) -> tuple[str, torch.device]:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model_name or ("facebook/sam3" if chosen.type == "cuda" else "small"), chosen


def _work(model_name: str, num_prompts: int, device: torch.device) -> tuple[Sam3Model, Any, Tensor, list[str]]:
    """The model, its tokenizer, one image and the prompts."""
    model = random_model(model_name, device=device)
    side = model.config.image_size
    pixel_values = torch.rand(1, 3, side, side, device=device) * 2 - 1
    prompts = [f"thing number {number}" for number in range(num_prompts)]
    return model, AutoTokenizer.from_pretrained(TINY_FOLDER, local_files_only=True), pixel_values, prompts


def _forward(model: Sam3Model, tokenizer: Any, image: Mapping[str, Any], prompt: str) -> Any:
    input_ids, attention_mask = tokenize(tokenizer, [prompt])
    return model(**image, input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device))


def _plain(
    model: Sam3Model,
    tokenizer: Any,
    pixel_values: Tensor,
    threshold: float,
    prompts: Sequence[str],
    *,
    by_hand: bool = False,
) -> list[dict[str, Tensor]]:
    """`by_hand` calls the vision encoder once and gives the stock forward what it returned."""
    processor = Sam3ImageProcessor()
    image = {"vision_embeds": model.vision_encoder(pixel_values)} if by_hand else {"pixel_values": pixel_values}
    found = []
    for prompt in prompts:
        output = _forward(model, tokenizer, image, prompt)
        found += processor.post_process_instance_segmentation(output, threshold=threshold, target_sizes=[SIZE_HW])
    return found


def _ours(
    model: Sam3Model,
    tokenizer: Any,
    pixel_values: Tensor,
    threshold: float,
    prompts: Sequence[str],
    *,
    vision: VisionFeatures | None = None,
) -> list[Detections]:
    forward = MixedForward(StagedSam3(model), AdapterBank(model, num_slots=1))
    post = PostProcessing(threshold=threshold, nms="none")
    with torch.inference_mode():
        image = vision or forward.encode_images(pixel_values, [None])[0]
        ids, masks = (one.to(pixel_values.device) for one in tokenize(tokenizer, prompts))
        text = forward.encode_text(ids, masks, [None] * len(prompts))
        rows = [
            Row(image, of_prompt, Wanted(prompt, SIZE_HW, post), geometry_cls=False)
            for prompt, of_prompt in zip(prompts, text, strict=True)
        ]
        return [small.at_full_size() for small in forward.detect(rows, max_rows=8)]


def _threshold(model: Sam3Model, tokenizer: Any, pixel_values: Tensor, prompts: Sequence[str]) -> float:
    """Random weights score everything alike: the score that a usual number of object queries reaches."""
    output = _forward(model, tokenizer, {"pixel_values": pixel_values}, prompts[0])
    scores = output.pred_logits.float().sigmoid() * output.presence_logits.float().sigmoid()
    return float(scores.quantile(1 - KEPT))


def _agreement(ours: Sequence[Detections], plain: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Detections of both ways, and the share of pixels on which their masks differ."""
    differing = [
        float((coco_mask.decode(found.rles).transpose(2, 0, 1) != expected["masks"].numpy()).mean())
        for found, expected in zip(ours, (_by_score(found) for found in plain), strict=True)
        if 0 < len(found) == len(expected["scores"])
    ]
    return {
        "detections, sam3lora": sum(map(len, ours)),
        "detections, transformers": sum(len(found["scores"]) for found in plain),
        "mask pixels that differ": round(float(np.mean(differing)), 6) if differing else None,
    }


def _by_score(found: dict[str, Tensor]) -> dict[str, Tensor]:
    order = found["scores"].argsort(descending=True, stable=True)
    return {name: value[order].cpu() for name, value in found.items()}
