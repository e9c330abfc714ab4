"""A training step of SAM 3 with the adapter of a preset, part by part.

Needs torch, transformers, PEFT, SciPy and NumPy, and none of what reads data or configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn
from transformers import Sam3Model

import sam3lora
from sam3lora.config.lora import LoraSection, LoraSettings
from sam3lora.losses import Criterion, Normalizer, Predictions, Targets
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.checkpointing import enable_checkpointing
from sam3lora.model.components import COMPONENTS
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import DetectorOutput, MaskHead, StagedSam3, TextFeatures, VisionFeatures
from sam3lora.training.graphs.gradient_graphs import GradientGraphs
from sam3lora.training.graphs.graphed_sam3 import GraphedCosts, GraphedSam3

Part = Callable[[str], AbstractContextManager[Any]]
"""Entered with the name of what comes next: "vision", "detector", "loss", "backward" or "optimizer"."""

PRESETS = Path(sam3lora.__file__).parent / "config" / "presets"


@dataclass(frozen=True)
class Preset:
    """What a shipped preset says: the adapter, and the components that it checkpoints."""

    lora: LoraSettings
    checkpointing: tuple[str, ...]

    @classmethod
    def read(cls, name: str) -> Preset:
        """Straight from its YAML file: reading a whole configuration needs more packages."""
        values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
        training = values["training"]
        wanted = training.get("gradient_checkpointing", False)
        checkpointing = COMPONENTS if wanted is True else tuple(wanted or ())
        return cls(LoraSection(**values["lora"]).settings, checkpointing)

    @property
    def adapts_vision(self) -> bool:
        return "vision_encoder" in (self.lora.components or COMPONENTS)


@dataclass(frozen=True)
class Case:
    """What a step is taken on.

    Args:
        images: In a batch.
        prompts: Of each image.
        objects: Of each prompt.
        cached: The trunk's outputs are there already.
    """

    images: int = 1
    prompts: int = 4
    objects: int = 4
    cached: bool = False


@dataclass(frozen=True)
class Inputs:
    """Random pixels or trunk outputs, text features, and targets of find queries in the order of the images.

    ``T`` targets, equally many of each find query; masks at the model's resolution.
    """

    case: Case
    pixels_ICHW: Tensor
    trunk_ISC: Tensor | None
    text: TextFeatures
    boxes_cxcywh_T4: Tensor
    masks_THW: Tensor

    @property
    def num_queries(self) -> int:
        return self.case.images * self.case.prompts

    def targets(self, rows: slice) -> Targets:
        """Those of a run of find queries."""
        packed = slice(rows.start * self.case.objects, rows.stop * self.case.objects)
        boxes_T4 = self.boxes_cxcywh_T4[packed]
        num_B = torch.full((rows.stop - rows.start,), self.case.objects)
        has_mask_T = torch.ones(len(boxes_T4), dtype=torch.bool, device=boxes_T4.device)
        return Targets(num_B, boxes_T4, self.masks_THW[packed], has_mask_T)

    def normalizer(self) -> Normalizer:
        return Normalizer.from_counts(self.num_queries, len(self.boxes_cxcywh_T4), self.num_queries)

    @classmethod
    def draw(cls, model: Sam3Model, case: Case, device: torch.device | str, *, seed: int = 0) -> Inputs:
        """Boxes anywhere, the ellipses in them as masks."""
        torch.manual_seed(seed)
        config = cast(Any, model.config)
        side, width = config.image_size, config.detr_encoder_config.hidden_size
        trunk, length = config.vision_config.backbone_config, config.text_config.max_position_embeddings
        boxes_T4 = torch.rand(case.images * case.prompts * case.objects, 4, device=device) * 0.3
        boxes_T4 = torch.cat([0.35 + boxes_T4[:, :2], 0.1 + boxes_T4[:, 2:]], 1)
        trunk_ISC = None
        if case.cached:
            trunk_ISC = torch.randn(case.images, (side // trunk.patch_size) ** 2, trunk.hidden_size, device=device)
            trunk_ISC = trunk_ISC.bfloat16()
        return cls(
            case,
            torch.rand(case.images, 3, side, side, device=device) * 2 - 1,
            trunk_ISC,
            TextFeatures(
                torch.randn(case.prompts, length, width, device=device),
                (torch.arange(length, device=device) < 4).repeat(case.prompts, 1),
            ),
            boxes_T4,
            _ellipses(boxes_T4, side),
        )


class Training:
    """A model with the adapter of a preset, trained as `sam3lora train` does.

    Args:
        model: Frozen, without adapter; it is changed in place.
        preset: Its name.
        make_graphs: Of the stages; None runs them as they are.
    """

    def __init__(self, model: Sam3Model, preset: str, make_graphs: Callable[[], GradientGraphs] | None = None) -> None:
        self.preset, self._criterion = Preset.read(preset), Criterion(touch_unused=False)
        self.peft = apply_lora(model, self.preset.lora)
        store_matrices_in(model, torch.bfloat16)
        enable_checkpointing(model, self.preset.checkpointing)
        self.staged = StagedSam3(model, checkpointing=self.preset.checkpointing)
        if make_graphs is not None:
            graphs = make_graphs()
            self._criterion.tables = GraphedCosts(self._criterion.tables, graphs)
            self.staged = GraphedSam3(model, checkpointing=self.preset.checkpointing, graphs=graphs)
        train_adapter_alone(self.peft)
        self.parameters = [parameter for parameter in self.peft.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self.parameters)

    def step(self, inputs: Inputs, max_prompts: int, part: Part = nullcontext) -> Tensor:
        """One update of the adapter; the loss."""
        total = self.gradients(inputs, max_prompts, part)
        with part("optimizer"):
            update(self._optimizer, self.parameters)
        return total

    def gradients(self, inputs: Inputs, max_prompts: int, part: Part = nullcontext) -> Tensor:
        """One vision pass, and the rest of forward and backward for `max_prompts` find queries at a time."""
        self.staged.begin_batch()
        with self.staged.adapters_cast_once(torch.bfloat16):
            return self._gradients(inputs, max_prompts, part)

    def _gradients(self, inputs: Inputs, max_prompts: int, part: Part) -> Tensor:
        case, num_queries, device = inputs.case, inputs.num_queries, inputs.pixels_ICHW.device
        autocast = torch.autocast(device.type, dtype=torch.bfloat16)
        with part("vision"), autocast:
            vision = self.staged.prepare(self._vision(inputs))
        image_B = torch.arange(case.images, device=device).repeat_interleave(case.prompts)
        text_B = torch.arange(case.prompts, device=device).repeat(case.images)
        shared = num_queries > max_prompts
        leaf = vision.detached() if shared else vision
        total = torch.zeros((), device=device)
        for start in range(0, num_queries, max_prompts):
            rows = slice(start, min(start + max_prompts, num_queries))
            with part("detector"), autocast:
                found = self.staged.detect(leaf, inputs.text, image_B[rows], text_B[rows], one_to_many=True)
                head = self.staged.mask_head(found, torch.arange(rows.stop - rows.start))
            with part("loss"):
                predictions = predictions_of(found, head)
                loss = self._criterion(predictions, inputs.targets(rows), inputs.normalizer()).total
            with part("backward"):
                loss.backward()
            total += loss.detach()
            del found, head, predictions, loss
        if shared:
            pairs = [(made, kept.grad) for made, kept in zip(vision.tensors(), leaf.tensors(), strict=True)]
            pairs = [(made, grad) for made, grad in pairs if made.requires_grad and grad is not None]
            with part("backward"):
                torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])
        return total

    def forget_gradients(self) -> None:
        self.peft.zero_grad(set_to_none=True)

    def _vision(self, inputs: Inputs) -> VisionFeatures:
        with torch.set_grad_enabled(self.preset.adapts_vision):
            if inputs.trunk_ISC is not None:
                return self.staged.encode_rest(inputs.trunk_ISC)
            return self.staged.encode_images(inputs.pixels_ICHW)


def predictions_of(found: DetectorOutput, head: MaskHead) -> Predictions:
    """All that SAM 3's training loss judges."""
    return Predictions(
        logits_LBQ=found.logits_LBQ,
        boxes_cxcywh_LBQ4=found.boxes_cxcywh_LBQ4,
        presence_logits_LB=found.presence_to_learn_LB(),
        logits_o2m_LBQ=found.logits_o2m_LBQ,
        boxes_o2m_LBQ4=found.boxes_o2m_LBQ4,
        mask_logits=head.branch_logits,
        semantic_logits=head.semantic_logits,
    )


def train_adapter_alone(model: nn.Module) -> None:
    """Training mode, where only the adapter's own dropout acts."""
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout." not in name:
            module.eval()


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=parameters[0].is_cuda)


def update(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _ellipses(boxes_cxcywh_T4: Tensor, side: int) -> Tensor:
    grid = (torch.arange(side, device=boxes_cxcywh_T4.device) + 0.5) / side
    across, down = (
        ((grid - boxes_cxcywh_T4[:, None, axis]) / boxes_cxcywh_T4[:, None, 2 + axis] * 2).square() for axis in (0, 1)
    )
    return down[:, :, None] + across[:, None, :] <= 1
