"""How many modules are adapted and how many parameters are trained, per component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sam3lora.model.components import COMPONENTS, adapter_layers, bare_name, component_of, unwrap

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class ComponentCount:
    """Counts of one component; ``total`` is without the adapter's own parameters."""

    total: int = 0
    modules_adapted: int = 0
    trainable: int = 0


@dataclass(frozen=True)
class ParameterTable:
    """Parameter counts of a model.

    ``total`` counts the base model (adapters not included), ``trainable`` what an optimizer would update, ``adapter``
    all LoRA parameters, trainable or not. ``components`` holds the rows that the model has; ``other`` is what belongs
    to none of SAM 3's components.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"percent": self.percent, "adapter_mb": self.adapter_mb}

    def render(self, title: str = "Parameters") -> Table:
        """A rich table, to be printed by a rich console."""
        from rich.table import Table

        table = Table(title=title)
        for heading in ("component", "modules adapted", "trainable", "base parameters"):
            table.add_column(heading, justify="left" if heading == "component" else "right")
        for name, count in self.components.items():
            table.add_row(name, str(count.modules_adapted), f"{count.trainable:,}", f"{count.total:,}")
        table.add_section()
        table.add_row("all", str(self.modules_adapted), f"{self.trainable:,} ({self.percent:.2f} %)", f"{self.total:,}")
        return table


def count_parameters(model: nn.Module) -> ParameterTable:
    """Count the parameters of any torch model, with or without a LoRA adapter, on any device (meta included)."""
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
