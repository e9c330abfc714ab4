"""LoRA layers on SAM 3 or any torch model: PEFT's own layers, on the modules that the settings select.

`lora_products.py` makes them run in fewer kernels.

LoRA: https://arxiv.org/abs/2106.09685, rank-stabilised: https://arxiv.org/abs/2312.03732,
DoRA: https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sam3lora.config.lora import LoraSettings
from sam3lora.model.adapter.folder import load_adapter, save_adapter
from sam3lora.model.adapter.lora_products import take_over
from sam3lora.model.adapter.targets import select_modules
from sam3lora.model.components import adapted_modules
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


def apply_lora(model: nn.Module, settings: LoraSettings, *, geometry_cls: bool = True) -> PeftModel:
    """Freeze ``model`` and add a LoRA adapter named ``default``; the model is changed in place.

    Any torch model will do when ``settings.components`` is None. A model on the meta device gets adapters on the meta
    device, for counting. Before training the output equals the base model's, because B starts at zero.

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
    take_over(peft_model)
    assert adapted_modules(peft_model) == names, "PEFT adapted other modules than the ones selected"
    return peft_model


def _also_matched(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Modules that PEFT would adapt too, as it takes a full name for a suffix (``text_projection`` also
    stands for ``text_encoder.text_projection``)."""
    wanted = set(names)
    suffixes = tuple("." + name for name in names)
    return [name for name, _ in model.named_modules() if name not in wanted and name.endswith(suffixes)]
