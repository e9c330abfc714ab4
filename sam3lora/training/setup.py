"""What a training worker holds, and how it is set up: model, adapter, data, optimizer, last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import Sam3Model

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.losses import Criterion, LossWeights
from sam3lora.model.adapter.folder import AdapterMetadata
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.checkpointing import enable_checkpointing, worth_checkpointing
from sam3lora.model.compilation import compile_layers
from sam3lora.model.components import COMPONENTS
from sam3lora.model.loading import load_base, tokenize
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training import distributed
from sam3lora.training.checkpoints import RunState, list_checkpoints, load_checkpoint
from sam3lora.training.datasets import BatchSource, RunData, load_run_data
from sam3lora.training.features.encoder import ImageEncoder, open_cache
from sam3lora.training.features.trunk_cache import TrunkCache
from sam3lora.training.fit_batch import resolve_batch_size
from sam3lora.training.metrics_log import MetricsLog, WarningsToMetrics
from sam3lora.training.optimization import build_optimizer
from sam3lora.training.step import LossRunner
from sam3lora.training.text_features import TextBank


@dataclass
class Worker:
    """Everything a training worker holds between steps."""

    config: Config
    output_dir: Path
    device: torch.device
    model: PeftModel
    tokenizer: Any
    metadata: AdapterMetadata
    optimizer: torch.optim.AdamW
    runner: LossRunner
    data: RunData
    batches: BatchSource
    state: RunState
    log: MetricsLog | None
    report: Any = None
    total_steps: int = 0
    looked_for_idle: bool = False

    @property
    def rank(self) -> int:
        return distributed.rank()

    def __post_init__(self) -> None:
        epochs_left = self.config.training.num_epochs - self.state.epoch
        left = epochs_left * self.batches.steps_per_epoch - self.state.step_in_epoch
        total = self.state.step + left
        self.total_steps = min(total, self.config.training.max_steps or total)


def set_up(config: Config, output_dir: Path, *, use_ray: bool) -> Worker:
    """Load data and model, add the adapter, and restore the last checkpoint if there is one."""
    training = config.training
    warnings = WarningsToMetrics() if use_ray else None
    device = _device(config, use_ray)
    base = load_base(
        config.model.name,
        revision=config.model.revision,
        dtype=config.model.dtype,
        device=device,
        attention=config.model.attention,
        local_files_only=config.model.local_files_only,
        resolution=config.model.resolution,
        quantization=config.model.quantization,
    )
    data = load_run_data(config, base.resolution)
    torch.manual_seed(training.seed)
    lora = LoraSettings.from_mapping(config.lora.model_dump())
    model = apply_lora(base.model, lora, geometry_cls=config.model.geometry_cls)
    sam3 = cast(Sam3Model, model.get_base_model())
    checkpointed = training.gradient_checkpointing
    components = worth_checkpointing(sam3, COMPONENTS if checkpointed is True else tuple(checkpointed or ()))
    enable_checkpointing(sam3, components)
    bf16 = training.mixed_precision == "bf16"
    if bf16:
        store_matrices_in(sam3, torch.bfloat16, text_tower=config.lora.apply_to_text_encoder)
    staged = StagedSam3(sam3, geometry_cls=config.model.geometry_cls, checkpointing=components)
    text = TextBank(
        staged,
        lambda prompts: tokenize(base.tokenizer, prompts),
        trainable=config.lora.apply_to_text_encoder,
        device=device,
    )
    text.add(data.prompts)
    text.release_tower()
    trunk = open_cache(config, staged, data, device)
    if training.compile:
        _compile(sam3, trunk, data, device)
    runner = LossRunner(
        staged=staged,
        criterion=_criterion(config),
        images=ImageEncoder(staged, device, config.lora.apply_to_vision_encoder, data.valid_settings, trunk),
        text=text,
        device=device,
        bf16=bf16,
        max_prompts=training.max_prompts_per_forward,
        one_to_many=training.one_to_many,
    )
    optimizer = build_optimizer(
        model,
        learning_rate=training.learning_rate,
        component_learning_rates=training.component_learning_rates,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
    )
    state = RunState()
    saved = list_checkpoints(output_dir / "checkpoints")
    if saved:
        state = load_checkpoint(saved[-1], model, optimizer, settings_of(config))
    config = resolve_batch_size(config, model, runner, data)
    batches = BatchSource(data, config, use_ray=use_ray, device=device, load_ahead=runner.images.load_ahead)
    # With other workers or batches a step takes another number of images: go on at the same place in the epoch.
    state.step_in_epoch = state.step_in_epoch * state.images_per_step // batches.images_per_step
    state.images_per_step = batches.images_per_step
    log = None
    if distributed.rank() == 0:
        log = MetricsLog(output_dir, after_step=state.step, tensorboard=config.logging.tensorboard)
        log.write(
            "start",
            step=state.step,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            device=str(device),
            num_workers=distributed.world_size(),
            steps_per_epoch=batches.steps_per_epoch,
            batch_size=config.training.batch_size,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            **data.summary(),
        )
        if warnings:
            warnings.write_to(log)
    metadata = AdapterMetadata(
        base_model=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        prompts=list(data.prompts),
        resolution=base.resolution,
        geometry_cls=config.model.geometry_cls,
        post_processing=config.evaluation.post_processing,
        data=data.summary(),
        lora=lora.to_dict(),
    )
    report = _ray_report() if use_ray else None
    return Worker(
        config=config,
        output_dir=output_dir,
        device=device,
        model=model,
        tokenizer=base.tokenizer,
        metadata=metadata,
        optimizer=optimizer,
        runner=runner,
        data=data,
        batches=batches,
        state=state,
        log=log,
        report=report,
    )


def settings_of(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _device(config: Config, use_ray: bool) -> torch.device:
    if use_ray:
        import ray
        from ray.train.torch import get_device

        device = get_device()
        # Of the CPUs that the worker reserved some are its data tasks'.
        own = ray.get_runtime_context().get_assigned_resources().get("CPU", 1) - config.training.num_workers
        torch.set_num_threads(max(1, min(int(own), torch.get_num_threads())))
    else:
        wanted = config.scaling.use_gpu
        if wanted is True and not torch.cuda.is_available():
            raise UserError("scaling.use_gpu is true, but torch finds no GPU here: set it to auto or false")
        on_gpu = wanted and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return device


def _compile(sam3: Sam3Model, trunk: TrunkCache | None, data: RunData, device: torch.device) -> None:
    """Compile the layers of the vision trunk that training images pass in every epoch."""
    num_kept = trunk.num_layers if trunk is not None and data.train_settings.features is not None else 0
    layers = list(cast(Any, sam3).vision_encoder.backbone.layers)[num_kept:]
    if not layers:
        raise UserError(
            "training.compile is true, but no module of the vision trunk is adapted, so each image passes it once: set "
            "training.compile to false"
        )
    compile_layers(layers, device)


def _ray_report():
    from ray import train

    return train.report


def _criterion(config: Config) -> Criterion:
    loss = config.training.loss
    names = ("bbox", "giou", "ce", "presence", "mask", "dice", "semantic", "semantic_dice", "o2m")
    return Criterion(
        LossWeights(**{name: getattr(loss, name) for name in names}),
        pos_weight=loss.pos_weight,
        mask_points=loss.num_points if loss.mask_resolution == "points" else None,
        touch_unused=False,  # gradients are averaged by hand: unused parameters hold nobody up
    )
