"""What each preset adapts in the full-size SAM 3, counted without weights.

``python -m sam3lora.model.publish.preset_table > docs/parameters.md`` writes the table in seconds, without weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import Sam3Config, Sam3Model

from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.base_folder import TINY
from sam3lora.model.components import COMPONENTS
from sam3lora.model.publish.parameter_table import ParameterTable, count_parameters

_INTRODUCTION = """# Adapted modules and trainable parameters

Per preset for the full-size SAM 3 ({total:.1f} M parameters); presets for the built-in tiny model are left out. A cell
is adapted modules / trainable parameters; MB (10^6 bytes) is the adapter file in float32. Written by
`python -m sam3lora.model.publish.preset_table > docs/parameters.md`.
"""


def count_on_full_size(settings: LoraSettings, *, geometry_cls: bool = True) -> ParameterTable:
    """Parameter counts of an adapter on SAM 3 at its published size, on the meta device."""
    with torch.device("meta"):
        model = Sam3Model(Sam3Config())
    return count_parameters(apply_lora(model, settings, geometry_cls=geometry_cls))


def render_markdown(tables: Mapping[str, ParameterTable], settings: Mapping[str, LoraSettings]) -> str:
    """A Markdown page with one row a preset and one column a component that any of them adapts."""
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

    configs = {preset: load_config(preset) for preset in preset_names()}
    configs = {preset: config for preset, config in configs.items() if config.model.name != TINY}
    settings = {preset: config.lora.settings for preset, config in configs.items()}
    tables = {
        preset: count_on_full_size(settings[preset], geometry_cls=config.model.geometry_cls)
        for preset, config in configs.items()
    }
    print(render_markdown(tables, settings), end="")


if __name__ == "__main__":
    main()
