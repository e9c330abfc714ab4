"""What SAM 3 takes at full size, stage by stage, counted with fake tensors: no weights, no GPU.

Shapes and attention are those of a GPU; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3DetrDecoder, Sam3SinePositionEmbedding

from jobs.bench.counting import OperationCounter, Tally, cuda_autocast_types
from jobs.bench.gpu_training import Case, Inputs, Training
from jobs.bench.models import random_model
from sam3lora.losses.masks import mask_loss_sums, semantic_loss_sums
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import DetectorOutput, MaskHead, StagedSam3

FULL_SIZE = "facebook/sam3"
ONE_TO_MANY = 4
"""Object queries that the one-to-many branch matches with a target, at most."""

KEPT = 30
"""Masks that inference makes."""


def stages_of(model: Sam3Model) -> dict[nn.Module, str]:
    """Which stage the modules of a model belong to; what is not named belongs to the caller's."""
    parts = cast(Any, model)
    roots = {
        parts.vision_encoder.backbone: "ViT trunk",
        parts.vision_encoder.neck: "neck",
        parts.text_encoder: "text encoder",
        parts.text_projection: "text encoder",
        parts.geometry_encoder: "geometry encoder",
        parts.detr_encoder: "DETR encoder",
        parts.detr_decoder: "DETR decoder",
        parts.dot_product_scoring: "scoring",
        parts.mask_decoder: "masks",
        parts.mask_decoder.pixel_decoder: "pixel decoder",
    }
    return {module: name for root, name in roots.items() for module in root.modules()}


@dataclass(frozen=True)
class Counted:
    """Bytes of memory and what the stages took.

    Args:
        by_stage: Stage -> what it took.
        kept: Stage -> bytes that it holds when the forward ends.
        weights: Bytes of the model's parameters and buffers on the device, the text tower left out, and of the state of
            the optimizer.
        peak: Largest number of bytes of all other tensors at a time.
    """

    by_stage: Mapping[str, Tally]
    kept: Mapping[str, int]
    weights: int
    peak: int

    @property
    def total(self) -> Tally:
        return Tally(sum((tally.kernels for tally in self.by_stage.values()), type(Tally().kernels)()))

    @property
    def memory_bytes(self) -> int:
        return self.weights + self.peak


def count_training(case: Case, model_name: str = FULL_SIZE, *, fake: bool = True, gpu_types: bool = True) -> Counted:
    """A step up to the gradients; AdamW's two moments are added to the weights.

    Every target has one match of the first branch and `ONE_TO_MANY` of the second; the assignment itself, which is done
    by the host, is left out.

    Args:
        case: Preset, images, prompts.
        model_name: A configuration of `jobs.bench.models`.
        fake: False computes, with the same counts.
        gpu_types: Whether autocast keeps the types that it keeps on a GPU.
    """
    model = random_model(model_name, device="meta" if fake else "cpu")
    training = Training(model, case, assumed_loss)
    weights = sum(t.nbytes for name, t in _tensors(model) if not name.startswith("text_encoder."))
    weights += 2 * sum(parameter.nbytes for parameter in training.parameters)
    with fake_tensors() if fake else nullcontext():
        if fake:
            fill_with_fakes(model)
        inputs = Inputs.draw(model, case, "cpu")
        kept: dict[str, int] = {}
        with cuda_autocast_types() if gpu_types else nullcontext(), OperationCounter(stages_of(model)) as counter:

            def part(name: str) -> Any:
                if name == "backward" and not kept:
                    kept.update(+counter.live_by_stage)
                return counter.stage({"vision": "geometry encoder", "detector": "DETR decoder"}.get(name, name))

            training.gradients(inputs, part)
        return Counted(counter.by_stage, kept, weights, counter.peak_bytes + bytes_of(inputs))


def count_inference(num_prompts: int = 1, model_name: str = FULL_SIZE) -> Counted:
    """One image: vision, text, detector and the masks of `KEPT` object queries, without gradients."""
    model = random_model(model_name, device="meta")
    store_matrices_in(model, torch.bfloat16, text_tower=True)
    with fake_tensors():
        fill_with_fakes(model)
        staged = StagedSam3(model)
        config = cast(Any, model.config)
        side, length = config.image_size, config.text_config.max_position_embeddings
        pixels = torch.zeros(1, 3, side, side)
        ids, mask = torch.zeros(num_prompts, length, dtype=torch.long), torch.ones(num_prompts, length)
        weights = sum(t.nbytes for _, t in _tensors(model))
        with (
            cuda_autocast_types(),
            OperationCounter(stages_of(model)) as counter,
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            with counter.stage("geometry encoder"):
                vision = staged.prepare(staged.encode_images(pixels))
            text = staged.encode_text(ids, mask)
            with counter.stage("DETR decoder"):
                zeros = torch.zeros(num_prompts, dtype=torch.long)
                found = staged.detect(vision, text, zeros, torch.arange(num_prompts))
            with counter.stage("masks"):
                _instance_logits(staged.mask_head(found, torch.arange(num_prompts)), "o2o", KEPT)
        return Counted(counter.by_stage, {}, weights, counter.peak_bytes)


def assumed_loss(found: DetectorOutput, head: MaskHead, inputs: Inputs, rows: slice) -> Tensor:
    """What the loss computes of masks, with matches that are assumed instead of found; of all else a plain mean."""
    objects = inputs.case.objects
    masks_THW = inputs.masks_THW[rows.start * objects : rows.stop * objects]
    total = found.logits_LBQ.float().mean() + found.boxes_cxcywh_LBQ4.mean() + found.presence_logits_LB.float().mean()
    if found.logits_o2m_LBQ is not None and found.boxes_o2m_LBQ4 is not None:
        total = total + found.logits_o2m_LBQ.float().mean() + found.boxes_o2m_LBQ4.mean()
    for branch, matches in (("o2o", 1), ("o2m", ONE_TO_MANY)):
        logits = _instance_logits(head, branch, objects * matches)
        target = torch.arange(len(masks_THW)).repeat_interleave(matches)
        total = total + mask_loss_sums(logits, masks_THW, target)[0]
    semantic = head._decoder.semantic_projection
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = semantic(head._pixels_KCHW).squeeze(1)
    unions = masks_THW.unflatten(0, (-1, objects)).any(1)
    return total + semantic_loss_sums(logits, lambda start, end: unions[start:end])[0]


def _instance_logits(head: MaskHead, branch: str, per_query: int) -> Tensor:
    """As `MaskHead.instance_logits`, which reads its indices, of the first object queries."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if head._instance_KCHW is None:
            head._instance_KCHW = head._decoder.instance_projection(head._pixels_KCHW)
        queries_KNC = head._decoder.mask_embedder(head._detections.hidden_BQC[branch][:, :per_query])
        products = [queries @ pixels.flatten(1) for queries, pixels in zip(queries_KNC, head._instance_KCHW)]
        return torch.cat(products).view(-1, *head._pixels_KCHW.shape[-2:])


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Fake tensors inside, and none left afterwards where transformers keeps position tables for all models."""
    with ExitStack() as stack:
        for owner, name in (
            (Sam3SinePositionEmbedding, "build_sine_position_embedding"),
            (Sam3DetrDecoder, "_get_coords"),
        ):
            kept = vars(owner)[name]
            bare = getattr(kept, "__wrapped__", kept)
            if isinstance(kept, staticmethod):
                bare = staticmethod(getattr(bare, "__wrapped__", bare))
            stack.enter_context(patch.object(owner, name, bare))
        stack.enter_context(FakeTensorMode())
        yield


def fill_with_fakes(model: nn.Module) -> None:
    """Put fake tensors in the place of those of the meta device, on which attention is not fused."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def bytes_of(inputs: Inputs) -> int:
    held = (inputs.pixels_ICHW, inputs.trunk_ISC, inputs.text.embeds_PTC, inputs.boxes_cxcywh_T4, inputs.masks_THW)
    return sum(tensor.nbytes for tensor in held if tensor is not None)
