"""Dense prediction as a `Task` of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sam3lora.config import Config
from sam3lora.losses.dense import DenseCriterion
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.adapter.metadata import DENSE, DENSE_FORMAT_VERSION, AdapterMetadata
from sam3lora.model.checkpointing import enable_checkpointing, worth_checkpointing
from sam3lora.model.components import COMPONENTS, unwrap
from sam3lora.model.dense.folder import head_tensors, save_dense
from sam3lora.model.dense.model import DenseSam3, chosen_layers
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.loading import LoadedBase
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.trunk import frozen_layers, keep_trunk_only
from sam3lora.training import best, setup
from sam3lora.training.costliest_batch import discard_gradients, noise_batch
from sam3lora.training.datasets import BatchSource, RunData, Splits
from sam3lora.training.dense.classes import DenseClasses
from sam3lora.training.dense.datasets import load_dense_data
from sam3lora.training.dense.runner import DenseImages, DenseRunner
from sam3lora.training.dense.validator import DenseValidator
from sam3lora.training.features.encoder import open_cache
from sam3lora.training.features.trunk_cache import FrozenPart, why_trunk_changes


class Dense:
    """A `Task` whose model is a `DenseSam3`."""

    asks_prompts = False

    def __init__(self) -> None:
        self._classes: DenseClasses | None = None

    @property
    def classes(self) -> DenseClasses:
        assert self._classes is not None, "load_data comes first"
        return self._classes

    def load_data(self, config: Config, resolution: int, patch_size: int, splits: Splits | None = None) -> RunData:
        data, self._classes = load_dense_data(config, resolution, patch_size, splits)
        return data

    def build(
        self, config: Config, base: LoadedBase, data: RunData, device: torch.device
    ) -> tuple[DenseSam3, DenseRunner]:
        training, dense = config.training, config.dense
        torch.manual_seed(training.seed)
        sam3: nn.Module = base.model
        keep_trunk_only(sam3)
        if dense.adapter == "lora":
            sam3 = apply_lora(base.model, config.lora.settings)
        settings = DenseSettings(
            mode=self.classes.mode,
            classes=self.classes.names,
            layers=chosen_layers(dense.layers, base.model.vision_encoder.backbone),
            width=dense.width,
            norm=dense.norm,
            bottleneck_width=dense.bottleneck_width if dense.adapter == "bottleneck" else None,
            threshold=dense.threshold,
        )
        model = DenseSam3(sam3, settings).to(device)
        checkpointed = training.gradient_checkpointing
        chosen = COMPONENTS if checkpointed is True else tuple(checkpointed or ())
        enable_checkpointing(unwrap(sam3), worth_checkpointing(unwrap(sam3), chosen))
        bf16 = setup.computes_in_bf16(config, device)
        if bf16:
            store_matrices_in(base.model, torch.bfloat16, text_tower=False)
        if training.compile:
            layers = base.model.vision_encoder.backbone.layers[frozen_layers(model.trunk) :]
            setup.compile_layers(layers, device)
        trunk = open_cache(
            config, base, _frozen_part(model), data, device, bf16=bf16, changing=_why_changing(config, model)
        )
        images = DenseImages(
            model,
            device=device,
            settings=data.valid_settings,
            image_mean=base.image_mean,
            image_std=base.image_std,
            trunk=trunk,
        )
        criterion = DenseCriterion(
            self.classes.mode, level_weights=dense.level_weights, boundary_weight=dense.boundary_weight
        )
        return model, DenseRunner(model, criterion, images, device, bf16)

    def learning_rates(self, config: Config) -> dict[str, float]:
        return {"dense_head": config.dense.learning_rate}

    def metadata(self, config: Config, base: LoadedBase, data: RunData) -> AdapterMetadata:
        return setup.run_metadata(
            base,
            data,
            lora=config.lora.settings.to_dict() if config.dense.adapter == "lora" else {},
            task=DENSE,
            dense={},  # of the model, when it is saved
            format_version=DENSE_FORMAT_VERSION,
        )

    def costliest(self, model: DenseSam3, runner: DenseRunner, data: RunData, *, model_dropout: bool) -> CostliestMaps:
        return CostliestMaps(model, runner, data, model_dropout)

    def validator(
        self,
        config: Config,
        base: LoadedBase,
        model: DenseSam3,
        runner: DenseRunner,
        data: RunData,
        batches: BatchSource,
    ) -> DenseValidator:
        return DenseValidator(config, base, model, runner, data, batches)

    def deciding_metric(self, config: Config, data: RunData) -> tuple[str, str | None]:
        return best.deciding_metric_of_labels(config, data)

    def learned(self, model: DenseSam3) -> dict[str, Tensor]:
        lora = {name: one for name, one in model.sam3.named_parameters() if ".lora_" in name}
        return head_tensors(model) | {f"sam3.{name}": parameter for name, parameter in lora.items()}

    @torch.no_grad()
    def restore(self, model: DenseSam3, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.learned(model).items():
            tensor.copy_(tensors[name])

    def save(self, model: DenseSam3, folder: Path, metadata: AdapterMetadata) -> None:
        save_dense(model, folder, replace(metadata, dense=model.settings.to_dict()))


def _frozen_part(model: DenseSam3) -> FrozenPart:
    *others, last = model.constant_layers or (-1,)
    return FrozenPart(model.trunk, last + 1, model.encode_constant, others=tuple(others))


def _why_changing(config: Config, model: DenseSam3) -> str | None:
    if not model.constant_layers:
        return "the adapter changes the first layer of the vision trunk; see lora.vision_last_layers and dense.adapter"
    return why_trunk_changes(config, (), model.trunk.config)


@dataclass
class CostliestMaps:
    """A `CostliestBackward`: all images of a dense run cost the same."""

    model: DenseSam3
    runner: DenseRunner
    data: RunData
    model_dropout: bool
    num_queries: int = 1

    def __call__(self, num_images: int, max_prompts: int) -> None:
        settings, rng = self.data.train_settings, np.random.default_rng(0)
        assert settings.label_maps is not None
        assert settings.mask_size is not None
        shape = (num_images, settings.label_maps.num_maps, settings.mask_size, settings.mask_size)
        most = 1 if settings.label_maps.overlapping else max(settings.label_maps.values.values())
        maps = rng.integers(0, most + 1, shape, dtype=np.uint8)
        batch = replace(noise_batch(self.data, num_images), label_maps=maps)
        norms = {name: value.clone() for name, value in self.model.dense_head.named_buffers()}
        try:
            discard_gradients(self.model, self.runner, batch, model_dropout=self.model_dropout)
        finally:
            for name, value in self.model.dense_head.named_buffers():
                value.copy_(norms[name])
