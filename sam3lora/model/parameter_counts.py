"""Counts of adapted modules and trained parameters per component, and the page of them for all presets.

``python -m sam3lora.model.parameter_counts > docs/parameters.md`` writes the page in seconds, without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from sam3lora.model.components import COMPONENTS, adapter_layers, bare_name, component_of, unwrap

if TYPE_CHECKING:
    from sam3lora.model.adapter.lora_layers import LoraSettings

_INTRODUCTION = """# Adapted modules and trainable parameters

Per preset for the full-size SAM 3 ({total:.1f} M parameters); presets for the built-in tiny model are left out. A cell
is adapted modules / trainable parameters; MB (10^6 bytes) is the adapter file in float32. Written by
`python -m sam3lora.model.parameter_counts > docs/parameters.md`.
"""


@dataclass
class ComponentCount:
    """Counts of one component; ``total`` leaves out the adapter's parameters."""

    total: int = 0
    modules_adapted: int = 0
    trainable: int = 0


@dataclass(frozen=True)
class ParameterTable:
    """Parameter counts of a model.

    ``total`` counts the base model without adapters, ``trainable`` the parameters that an optimizer would update, and
    ``adapter`` all LoRA parameters, trainable or not. ``components`` has a row for each component of the model;
    ``other`` are parameters outside SAM 3's components.
    """

    total: int
    trainable: int
    adapter: int
    components: dict[str, ComponentCount]

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of the base model's."""
        return 100 * self.trainable / self.total if self.total else 0.0

    @property
    def modules_adapted(self) -> int:
        return sum(count.modules_adapted for count in self.components.values())

    @property
    def adapter_mb(self) -> float:
        """Size of the adapter file in MB (10^6 bytes), stored in float32."""
        return 4 * self.adapter / 1e6


def count_parameters(model: nn.Module) -> ParameterTable:
    """Count the parameters of any torch model, with or without a LoRA adapter, on any device, also on meta."""
    base = unwrap(model)
    counts = {component: ComponentCount() for component in (*COMPONENTS, "other")}
    adapter_names = set()
    for name, layer in adapter_layers(base):
        counts[component_of(name) or "other"].modules_adapted += 1
        prefix = f"{name}."
        adapter_names |= {
            prefix + inner
            for inner, _ in layer.named_parameters()
            if any(inner.startswith(f"{kind}.") for kind in cast(Sequence[str], layer.adapter_layer_names))
        }
    for name, parameter in base.named_parameters():
        count = counts[component_of(name) or "other"]
        if parameter.requires_grad:
            count.trainable += parameter.numel()
        if bare_name(name) not in adapter_names:
            count.total += parameter.numel()
    adapter = sum(p.numel() for name, p in base.named_parameters() if bare_name(name) in adapter_names)
    return ParameterTable(
        total=sum(count.total for count in counts.values()),
        trainable=sum(count.trainable for count in counts.values()),
        adapter=adapter,
        components={name: count for name, count in counts.items() if count.total},
    )


def count_on_full_size(settings: LoraSettings, *, geometry_cls: bool = True) -> ParameterTable:
    """Parameter counts of an adapter on SAM 3 at its published size, on the meta device."""
    from transformers import Sam3Config, Sam3Model

    from sam3lora.model.adapter.lora_layers import apply_lora

    with torch.device("meta"):
        model = Sam3Model(Sam3Config())
    return count_parameters(apply_lora(model, settings, geometry_cls=geometry_cls))


def render_markdown(tables: Mapping[str, ParameterTable], settings: Mapping[str, LoraSettings]) -> str:
    """A Markdown page with a row for each preset and a column for each component that some preset adapts."""
    used = [name for name in COMPONENTS if any(table.components[name].modules_adapted for table in tables.values())]
    heading = ["preset", "rank", *(name.replace("_", " ") for name in used), "all", "percent", "MB"]
    rows = [heading, ["---"] * 2 + ["---:"] * (len(heading) - 2)]
    for preset, table in tables.items():
        cells = []
        for name in used:
            count = table.components[name]
            cells.append(f"{count.modules_adapted} / {count.trainable:,}" if count.modules_adapted else "-")
        total = f"{table.modules_adapted} / {table.trainable:,}"
        size = [f"{table.percent:.2f} %", f"{table.adapter_mb:.1f}"]
        rows.append([preset, str(settings[preset].rank), *cells, total, *size])
    base = next(iter(tables.values())).total / 1e6
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([_INTRODUCTION.format(total=base), *lines]) + "\n"


def main() -> None:
    from sam3lora.config import load_config, preset_names
    from sam3lora.model.tiny import TINY

    configs = {preset: load_config(preset) for preset in preset_names()}
    configs = {
        preset: config for preset, config in configs.items() if config.model.name != TINY and config.lora.components
    }
    settings = {preset: config.lora.settings for preset, config in configs.items()}
    tables = {
        preset: count_on_full_size(settings[preset], geometry_cls=config.model.geometry_cls)
        for preset, config in configs.items()
    }
    print(render_markdown(tables, settings), end="")


if __name__ == "__main__":
    main()
