"""Settings of the LoRA adapter: rank, scale, adapted layers."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from ._section import Section, Settings
from .components import COMPONENTS


class LoraFields(Section):
    """The fields that `LoraSettings` and the `lora` section of a configuration share."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank r of the update B A added to each adapted layer.")
    alpha: float = Field(
        default=32, gt=0, le=4096, description="Scale: the update is multiplied by alpha / rank (rsLoRA: / sqrt(rank))."
    )
    dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Dropout on the input of adapters in training, once for layers of one input.",
    )
    target_modules: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        min_length=1,
        description="Layers to adapt, by the last part of their name. The aliases qkv, proj, out_proj, c_fc, c_proj, "
        "linear1 and linear2 work too.",
    )
    vision_last_layers: int | None = Field(
        default=None, ge=1, description="Adapt only the last k layers of the vision encoder; None = all."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank): steadier at high ranks.")
    use_dora: bool = Field(
        default=False,
        description="Learn the magnitude and the direction of each update separately (DoRA): slower to train.",
    )

    @field_validator("target_modules")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name.strip() for name in names):
            raise ValueError("should hold module names, and one of them is empty")
        return tuple(dict.fromkeys(names))


class LoraSettings(LoraFields, Settings):
    """What `apply_lora` adapts and how.

    `components` None means the whole model, whatever it is. `sam3lora.model.adapter.targets.select_modules` explains
    `target_modules` and `vision_last_layers`.
    """

    components: tuple[str, ...] | None = ("vision_encoder",)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `LoraSettings(**values)` gives equal settings."""
        return self.model_dump(mode="json")


class LoraSection(LoraFields):
    """Rank, scale and place of the adapters. A component whose flag is missing stays frozen."""

    apply_to_vision_encoder: bool = Field(default=False, description="Adapt the ViT image encoder (454 M parameters).")
    apply_to_text_encoder: bool = Field(
        default=False, description="Adapt the text encoder; this can make prompts harder to tell apart."
    )
    apply_to_geometry_encoder: bool = Field(default=False, description="Adapt the encoder of box prompts and of CLS.")
    apply_to_detr_encoder: bool = Field(default=False, description="Adapt the fusion of image and prompt.")
    apply_to_detr_decoder: bool = Field(default=False, description="Adapt the decoder of the object queries.")
    apply_to_mask_decoder: bool = Field(default=False, description="Adapt the mask head.")
    apply_to_scoring: bool = Field(
        default=False, description="Adapt the prompt-to-object scores; target text_proj and query_proj as well."
    )

    @classmethod
    def flags(cls) -> tuple[str, ...]:
        """The keys of which one at least is true where there is an adapter."""
        return tuple(f"apply_to_{name}" for name in COMPONENTS)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the adapted components, in the order of `COMPONENTS`."""
        return tuple(name for name in COMPONENTS if getattr(self, f"apply_to_{name}"))

    @property
    def settings(self) -> LoraSettings:
        """The settings for `apply_lora`."""
        shared = {name: getattr(self, name) for name in LoraFields.model_fields}
        return LoraSettings(components=self.components, **shared)

    @model_validator(mode="after")
    def _check_places(self) -> LoraSection:
        if self.vision_last_layers is not None and not self.apply_to_vision_encoder:
            raise ValueError("vision_last_layers has no effect while apply_to_vision_encoder is false: set it to true")
        return self
