"""LoRA layers on SAM 3 or any torch model: PEFT's own layers, on the modules that the settings select.

LoRA: https://arxiv.org/abs/2106.09685, rank-stabilised: https://arxiv.org/abs/2312.03732,
DoRA: https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import load_adapter, save_adapter
from sam3lora.model.adapter.targets import select_modules
from sam3lora.model.components import COMPONENTS, adapted_modules
from sam3lora.model.parameter_counts import ParameterTable, count_parameters

__all__ = [
    "LoraSettings",
    "ParameterTable",
    "adapted_modules",
    "apply_lora",
    "count_parameters",
    "load_adapter",
    "save_adapter",
]

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


@dataclass(frozen=True)
class LoraSettings:
    """What to adapt and how. The update is ``alpha / rank * B A x`` (``alpha / sqrt(rank)`` with rsLoRA).

    ``components`` None means the whole model, whatever it is; ``target_modules`` and ``vision_last_layers`` are
    explained in :func:`sam3lora.model.adapter.targets.select_modules`.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.1
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    components: tuple[str, ...] | None = ("vision_encoder",)
    vision_last_layers: int | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str) or isinstance(self.components, str):
            raise UserError("target_modules and components must be lists of names, got a single string")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.components is not None:
            object.__setattr__(self, "components", tuple(self.components))
        if self.rank < 1:
            raise UserError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")

    @classmethod
    def from_mapping(cls, lora: Mapping[str, Any]) -> LoraSettings:
        """From the keys of a ``lora`` section, where each component has a flag ``apply_to_<component>``."""
        names = {name for name in cls.__dataclass_fields__ if name != "components"}
        components = tuple(component for component in COMPONENTS if lora.get(f"apply_to_{component}"))
        return cls(components=components, **{name: lora[name] for name in names if lora.get(name) is not None})

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``LoraSettings(**values)`` gives the settings back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def apply_lora(model: nn.Module, settings: LoraSettings, *, geometry_cls: bool = True) -> PeftModel:
    """Freeze ``model`` and add a LoRA adapter named ``default``; the model is changed in place.

    Args:
        model: a Sam3Model, or any torch model when ``settings.components`` is None. A model on the meta device gets
            adapters on the meta device, for counting.
        geometry_cls: whether training adds the geometry CLS token (see :func:`select_modules`).

    Returns:
        The PEFT model. Before training its output equals the base model's, because B starts at zero.

    Raises:
        UserError: settings that match nothing, see :func:`select_modules`.
        ValueError: the model already carries an adapter.
    """
    if adapted_modules(model):
        raise ValueError("the model already carries an adapter: call merge_and_unload() or unload() first")
    names = select_modules(
        model,
        settings.target_modules,
        components=settings.components,
        vision_last_layers=settings.vision_last_layers,
        geometry_cls=geometry_cls,
    )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(names),
        exclude_modules=_also_matched(model, names) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks by the old name
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    assert adapted_modules(peft_model) == names, "PEFT adapted other modules than the ones selected"
    return peft_model


def _also_matched(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Modules that PEFT would adapt too, as it takes a full name for a suffix (``text_projection`` also
    stands for ``text_encoder.text_projection``)."""
    wanted = set(names)
    suffixes = tuple("." + name for name in names)
    return [name for name, _ in model.named_modules() if name not in wanted and name.endswith(suffixes)]
