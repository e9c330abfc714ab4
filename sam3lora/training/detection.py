"""The task of SAM 3 itself: all objects of a prompt, with their masks."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from sam3lora.config import Config
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import LoadedBase
from sam3lora.training import best, setup
from sam3lora.training.costliest_batch import CostliestPrompts
from sam3lora.training.datasets import BatchSource, RunData, Splits, load_run_data
from sam3lora.training.step import LossRunner
from sam3lora.training.validator import DetectionValidator


class Detection:
    """A `Task` whose model is a `PeftModel`."""

    asks_prompts = True

    def load_data(self, config: Config, resolution: int, patch_size: int, splits: Splits | None = None) -> RunData:
        return load_run_data(config, resolution, patch_size, splits=splits)

    def build(
        self, config: Config, base: LoadedBase, data: RunData, device: torch.device
    ) -> tuple[PeftModel, LossRunner]:
        return setup.add_adapter(config, base, data, device)

    def learning_rates(self, config: Config) -> dict[str, float]:
        return config.training.component_learning_rates

    def metadata(self, config: Config, base: LoadedBase, data: RunData) -> AdapterMetadata:
        return setup.adapter_metadata(config, base, data)

    def costliest(
        self, model: PeftModel, runner: LossRunner, data: RunData, *, model_dropout: bool
    ) -> CostliestPrompts:
        return CostliestPrompts(model, runner, data, model_dropout=model_dropout)

    def validator(
        self,
        config: Config,
        base: LoadedBase,
        model: PeftModel,
        runner: LossRunner,
        data: RunData,
        batches: BatchSource,
    ) -> DetectionValidator:
        return DetectionValidator(config, base, model, runner, data, batches)

    def deciding_metric(self, config: Config, data: RunData) -> tuple[str, str | None]:
        return best.deciding_metric(config, data)

    def learned(self, model: PeftModel) -> dict[str, Tensor]:
        return get_peft_model_state_dict(model, save_embedding_layers=False)

    def restore(self, model: PeftModel, tensors: dict[str, Tensor]) -> None:
        set_peft_model_state_dict(model, tensors)

    def save(self, model: PeftModel, folder: Path, metadata: AdapterMetadata) -> None:
        save_adapter(model, folder, metadata)
