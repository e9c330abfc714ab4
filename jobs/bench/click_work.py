"""What clicks take of a GPU at full size: memory and kernels, counted without one as in `memory` and `launches`.

    python -m jobs.bench.click_work

An image of 1008 pixels: its features, the answer for some of its objects from a click, a box and a mask, and the
costliest prediction of a training step of the preset `clicks`, three masks for each object.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Sam3VisionConfig
from transformers.models.sam3_tracker.configuration_sam3_tracker import (
    Sam3TrackerMaskDecoderConfig,
    Sam3TrackerPromptEncoderConfig,
)

from jobs.bench.gpu_timing import Row
from jobs.bench.memory import as_on_a_gpu
from jobs.bench.pretend_gpu import DEVICE, pretend_gpu
from jobs.bench.scripts import run_script
from jobs.bench.tensor_memory import TensorMemory
from sam3lora.config import load_config
from sam3lora.engine.clicks.answers import MAX_OBJECTS
from sam3lora.losses.clicks import ClickCriterion
from sam3lora.model.clicks.adapter import add_click_lora
from sam3lora.model.clicks.head import ClickFeatures, ClickHead, ClickOutput
from sam3lora.model.precision import store_matrices_in

OBJECTS = (1, 4, 16)
TRUNK_BYTES = 2 * 446_000_000
"""The vision trunk in bfloat16."""


def head_on_the_device() -> ClickHead:
    """A head of the full size, with random weights."""
    with torch.device(DEVICE):
        head = ClickHead(Sam3VisionConfig(), Sam3TrackerPromptEncoderConfig(), Sam3TrackerMaskDecoderConfig())
    return head.requires_grad_(False).eval()


def tokens_of(images: int, head: ClickHead) -> Tensor:
    side = head.mask_side // 4
    return torch.zeros(images, side * side, 1024, dtype=torch.bfloat16, device=DEVICE)


def answer(head: ClickHead, features: ClickFeatures, objects: int, *, multimask: bool = False) -> ClickOutput:
    """For objects that are spread over the images: three masks from a click, or one from a click, a box and a mask."""
    images, side = len(features.coarse), head.mask_side
    return head.decode(
        features.of_objects(torch.arange(images, device=DEVICE).repeat_interleave(objects // images)),
        points_NK2=torch.zeros(objects, 1, 2, device=DEVICE),
        labels_NK=torch.ones(objects, 1, dtype=torch.long, device=DEVICE),
        boxes_N4=None if multimask else torch.zeros(objects, 4, device=DEVICE),
        masks_Nmm=None if multimask else torch.zeros(objects, side, side, device=DEVICE),
        multimask=multimask,
    )


@torch.no_grad()
def answer_rows() -> list[Row]:
    """Kernels, and the most memory beside weights and features in 10^6 bytes, in bfloat16."""
    rows: list[Row] = []
    with ExitStack() as stack:
        memory = stack.enter_context(TensorMemory(torch.device("meta")))
        launches = stack.enter_context(pretend_gpu(with_values=False))
        stack.enter_context(as_on_a_gpu())
        stack.enter_context(torch.autocast("cuda", dtype=torch.bfloat16))
        head = head_on_the_device()
        store_matrices_in(head, torch.bfloat16)  # as the engine does

        def counted(work: str, run: Any) -> Any:
            launches.clear()
            memory.forget_peak()
            before = memory.live_bytes
            out = run()
            rows.append({"work": work, "kernels": launches.total, "MB": (memory.peak_bytes - before) / 1e6})
            return out

        tokens = tokens_of(1, head)
        features = counted("features of an image", lambda: head.embed(tokens))
        for objects in OBJECTS:
            counted(f"answer for {objects}", lambda objects=objects: answer(head, features, objects))
    return rows


def training_peak_bytes(images: int, *, bf16: bool = True) -> int:
    """The most that a step of `clicks` takes with the trunk's output cached.

    Weights, AdamW's moments and one prediction for `MAX_OBJECTS` objects, spread over the images of a batch: more pass
    the head one after the other, and each prediction has a backward pass of its own.
    """
    with TensorMemory(torch.device("meta")) as memory, pretend_gpu(with_values=False), as_on_a_gpu():
        head = head_on_the_device()
        model = add_click_lora(head, load_config("clicks").lora.settings)
        model.train()
        side = head.input_side
        truth = torch.zeros(MAX_OBJECTS, side, side, dtype=torch.bool, device=DEVICE)
        tokens = tokens_of(images, head)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                features = head.embed(tokens if bf16 else tokens.float())
            output = answer(head, features, MAX_OBJECTS, multimask=True)
        loss = ClickCriterion()(output.logits_NMmm, output.iou_NM, output.object_N, truth, MAX_OBJECTS)
        loss.total.backward()
        moments = 2 * sum(one.nbytes for one in model.parameters() if one.requires_grad)
        return memory.peak_bytes + moments + TRUNK_BYTES * (1 if bf16 else 2)


def training_rows() -> list[Row]:
    preset = cast(int, load_config("clicks").training.batch_size)
    return [
        {"images": images}
        | {f"{name} GB": training_peak_bytes(images, bf16=name == "bf16") / 1e9 for name in ("bf16", "fp32")}
        for images in sorted({1, preset})
    ]


def main() -> None:
    for row in [*answer_rows(), *training_rows()]:
        print(row)


if __name__ == "__main__":
    sys.exit(run_script(main))
