"""A training step of this package, set up as `training.setup` does, and the optimizer step that all ways share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from jobs.bench.training_work import PIXEL_MEAN_STD, TrainingWork, criterion, normalizer, sam3_of, tokenizer
from sam3lora.data.batch import Batch
from sam3lora.data.sample import DecodeSettings
from sam3lora.engine.graphs.capture import Capturer
from sam3lora.losses import Criterion, LossOutput, Normalizer, Predictions, Targets
from sam3lora.losses.matching import PendingMatches
from sam3lora.model.checkpointing import enable_checkpointing, worth_checkpointing
from sam3lora.model.components import COMPONENTS
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.model.tokenization import tokenize
from sam3lora.training.features.encoder import ImageEncoder
from sam3lora.training.features.trunk_cache import TrunkCache
from sam3lora.training.forward_sizes import prompts_on_cpu
from sam3lora.training.graphs.gradient_graphs import GradientGraphs
from sam3lora.training.graphs.graphed_sam3 import GraphedCosts, GraphedSam3
from sam3lora.training.optimization import build_optimizer
from sam3lora.training.step import LossRunner
from sam3lora.training.text_features import TextBank


@dataclass(frozen=True)
class OurSettings:
    """What our training may choose; None is the preset's.

    Args:
        checkpointing: Components that recompute their activations.
        max_prompts: Find queries at a time.
        same_loss: Only the last layer and no one-to-many branch: the loss that the stock forward allows.
    """

    checkpointing: tuple[str, ...] | None = None
    max_prompts: int | None = None
    same_loss: bool = False


class LastLayerCriterion(Criterion):
    """Sees the last decoder layer alone."""

    def begin(self, predictions: Predictions, targets: Targets) -> PendingMatches:
        return super().begin(_last_layer(predictions), targets)

    def __call__(
        self,
        predictions: Predictions,
        targets: Targets,
        normalizer: Normalizer | None = None,
        pending: PendingMatches | None = None,
    ) -> LossOutput:
        return super().__call__(_last_layer(predictions), targets, normalizer, pending)


def _last_layer(predictions: Predictions) -> Predictions:
    return replace(
        predictions,
        logits_LBQ=predictions.logits_LBQ[-1:],
        boxes_cxcywh_LBQ4=predictions.boxes_cxcywh_LBQ4[-1:],
        presence_logits_LB=predictions.presence_logits_LB[-1:],
    )


def make_runner(
    work: TrainingWork,
    model: PeftModel,
    settings: OurSettings | None = None,
    *,
    open_trunk: Callable[[StagedSam3], TrunkCache] | None = None,
    capturer: Capturer | None = None,
) -> LossRunner:
    """What computes the loss in training.

    Args:
        work: What is trained.
        model: From `work.adapted_model()`.
        settings: Where they differ from the preset's.
        open_trunk: Makes what keeps the trunk's outputs; None keeps none.
        capturer: Makes graphs of the stages; None makes none.
    """
    settings = settings or OurSettings()
    training, lora = work.config.training, work.config.lora
    sam3, device = sam3_of(model), torch.device(work.device)
    components = worth_checkpointing(sam3, wanted_checkpointing(work, settings))
    enable_checkpointing(sam3, components)
    if work.bf16:
        store_matrices_in(sam3, torch.bfloat16, text_tower=lora.apply_to_text_encoder)
    staged = StagedSam3(sam3, geometry_cls=work.geometry_cls, checkpointing=components)
    loss = criterion(work, LastLayerCriterion if settings.same_loss else Criterion)
    if capturer:
        graphs = GradientGraphs(lambda: capturer)
        staged = GraphedSam3(sam3, geometry_cls=work.geometry_cls, checkpointing=components, graphs=graphs)
        loss.tables = GraphedCosts(loss.tables, graphs)
    words = tokenizer()
    frames = DecodeSettings(names=(), resolution=work.resolution)
    trunk = open_trunk(staged) if open_trunk else None
    return LossRunner(
        staged=staged,
        criterion=loss,
        images=ImageEncoder(
            staged,
            lora.apply_to_vision_encoder,
            device=device,
            settings=frames,
            image_mean=PIXEL_MEAN_STD[0],
            image_std=PIXEL_MEAN_STD[1],
            trunk=trunk,
        ),
        text=TextBank(
            staged, lambda asked: tokenize(words, asked), trainable=lora.apply_to_text_encoder, device=device
        ),
        device=device,
        bf16=work.bf16,
        max_prompts=settings.max_prompts or wanted_prompts(work),
        one_to_many=training.one_to_many and not settings.same_loss,
    )


def wanted_checkpointing(work: TrainingWork, settings: OurSettings) -> tuple[str, ...]:
    """The components that the settings, or else the preset, name; some may have nothing to recompute."""
    if settings.checkpointing is not None:
        return settings.checkpointing
    chosen = work.config.training.gradient_checkpointing
    return COMPONENTS if chosen is True else tuple(chosen or ())


def wanted_prompts(work: TrainingWork) -> int:
    """Find queries at a time, as a run of the preset takes them on a CPU."""
    given = work.config.training.max_prompts_per_forward
    return prompts_on_cpu(work.resolution) if given == "auto" else given


def step_of(
    work: TrainingWork, model: nn.Module, backward: Callable[[Batch, Normalizer], Tensor]
) -> Callable[[Batch], float]:
    """`batch -> loss`: gradients by `backward`, clipping and AdamW as the preset has them."""
    training = work.config.training
    optimizer = build_optimizer(model, learning_rate=training.learning_rate, weight_decay=training.weight_decay)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(batch: Batch) -> float:
        loss = backward(batch, normalizer(batch))
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def our_step(work: TrainingWork, model: PeftModel, runner: LossRunner) -> Callable[[Batch], float]:
    return step_of(work, model, lambda batch, counts: runner.backward(batch, counts)[0])
