"""LoRA on the click head as a `Task` of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from sam3lora.config import Config
from sam3lora.data.index_columns import object_columns
from sam3lora.losses.clicks import ClickCriterion
from sam3lora.model.adapter.metadata import CLICKS, CLICKS_FORMAT_VERSION, AdapterMetadata
from sam3lora.model.clicks.adapter import ClickOrigin, add_click_lora, add_vision_adapter, save_click_adapter
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import LoadedBase
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.trunk import keep_trunk_only
from sam3lora.training import best, setup
from sam3lora.training.clicks.datasets import load_click_data
from sam3lora.training.clicks.runner import ClickImages, ClickRunner
from sam3lora.training.clicks.validator import ClickValidator
from sam3lora.training.costliest_batch import discard_gradients, noise_batch
from sam3lora.training.datasets import BatchSource, RunData, Splits
from sam3lora.training.features.encoder import open_cache
from sam3lora.training.features.trunk_cache import FrozenPart


class Clicks:
    """A `Task` whose model is the mask decoder of the click head in a `PeftModel`."""

    asks_prompts = False

    def __init__(self) -> None:
        self._origin: ClickOrigin | None = None

    def load_data(self, config: Config, resolution: int, patch_size: int, splits: Splits | None = None) -> RunData:
        return load_click_data(config, resolution, patch_size, splits)

    def build(
        self, config: Config, base: LoadedBase, data: RunData, device: torch.device
    ) -> tuple[PeftModel, ClickRunner]:
        clicks = config.clicks
        torch.manual_seed(config.training.seed)
        head = load_click_head(base)
        digest = None if clicks.vision_adapter is None else add_vision_adapter(base, clicks.vision_adapter)
        self._origin = ClickOrigin(tracker_fingerprint=fingerprint(head), vision_adapter=digest)
        keep_trunk_only(base.model)
        model = add_click_lora(head, config.lora.settings)
        bf16 = setup.computes_in_bf16(config, device)
        if bf16:
            store_matrices_in(base.model, torch.bfloat16, text_tower=False)
        images = ClickImages(
            head,
            base.model.vision_encoder.backbone,
            device=device,
            settings=data.valid_settings,
            image_mean=base.image_mean,
            image_std=base.image_std,
        )
        images.trunk = open_cache(config, base, _frozen_part(images, bf16), data, device, bf16=bf16, changing=None)
        images.settings = data.valid_settings  # with the cache
        runner = ClickRunner(
            head,
            ClickCriterion(clicks.loss.by_term()),
            images,
            device,
            clicks.starts,
            clicks.iterations,
            config.training.seed,
            bf16,
        )
        return model, runner

    def learning_rates(self, config: Config) -> dict[str, float]:
        return {}

    def metadata(self, config: Config, base: LoadedBase, data: RunData) -> AdapterMetadata:
        assert self._origin is not None, "build comes first"
        return setup.run_metadata(
            base,
            data,
            lora=config.lora.settings.to_dict(),
            task=CLICKS,
            clicks=self._origin.model_dump(),
            format_version=CLICKS_FORMAT_VERSION,
        )

    def costliest(
        self, model: PeftModel, runner: ClickRunner, data: RunData, *, model_dropout: bool
    ) -> CostliestObjects:
        return CostliestObjects(model, runner, data)

    def validator(
        self,
        config: Config,
        base: LoadedBase,
        model: PeftModel,
        runner: ClickRunner,
        data: RunData,
        batches: BatchSource,
    ) -> ClickValidator:
        return ClickValidator(config, base, model, runner, data, batches)

    def deciding_metric(self, config: Config, data: RunData) -> tuple[str, str | None]:
        return best.deciding_metric_of_labels(config, data)

    def learned(self, model: PeftModel) -> dict[str, Tensor]:
        return get_peft_model_state_dict(model, save_embedding_layers=False)

    def restore(self, model: PeftModel, tensors: dict[str, Tensor]) -> None:
        set_peft_model_state_dict(model, tensors)

    def save(self, model: PeftModel, folder: Path, metadata: AdapterMetadata) -> None:
        save_click_adapter(model, folder, metadata)


def _frozen_part(images: ClickImages, bf16: bool) -> FrozenPart:
    """The whole trunk; the neck casts to the type of its weights, and under autocast to bfloat16."""
    trunk, head = images.vision_trunk, images.head
    dtype = torch.bfloat16 if bf16 else head.no_memory_embedding.dtype
    return FrozenPart(trunk, len(trunk.layers), images.tokens, dtype=dtype)


@dataclass
class CostliestObjects:
    """A `CostliestBackward`: images with as many objects as one of the split has at most."""

    model: PeftModel
    runner: ClickRunner
    data: RunData
    num_queries: int = 1

    def __call__(self, num_images: int, max_prompts: int) -> None:
        most = self.data.train_settings.max_per_image
        assert most is not None
        objects = object_columns(self.data.train.table)
        most = min(most, int(objects.count_per_image(~objects.crowd_T).max()))
        discard_gradients(self.model, self.runner, noise_batch(self.data, num_images, [most]))
