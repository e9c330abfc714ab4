"""Bottleneck adapters: a small residual MLP before each layer of the vision trunk, as SAM3-UNet has them.

    x -> x + GELU(up(GELU(down(x)))),    down: C -> hidden, up: hidden -> C

They are submodules of the layers, named `bottleneck`, that run as forward pre-hooks. So the trunk keeps its class and
the names of its weights, and its layers count as trainable where an adapter is.
Source: SAM3-UNet, https://arxiv.org/abs/2512.01789; Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 32
"""Width of the original's bottleneck."""
_STD = 0.02


class Bottleneck(nn.Module):
    """Adds a correction to tokens (..., C) and keeps their type.

    Args:
        channels: C.
        hidden: Width of the bottleneck.
        starts_as_identity: Begin with a correction of zero. The original begins with a small random one.
    """

    def __init__(self, channels: int, hidden: int = HIDDEN, *, starts_as_identity: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(channels, hidden)
        self.up = nn.Linear(hidden, channels)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=_STD)
            nn.init.zeros_(layer.bias)
        if starts_as_identity:
            nn.init.zeros_(self.up.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.down(tokens.to(self.down.weight.dtype)))
        return tokens + F.gelu(self.up(hidden)).to(tokens.dtype)


def add_bottlenecks(
    trunk: Any, *, hidden: int = HIDDEN, starts_as_identity: bool = True, layers: Iterable[int] | None = None
) -> list[Bottleneck]:
    """Put an adapter, in float32, before layers of a `Sam3ViTModel`, by default before all, and return them.

    Args:
        trunk: The base's vision trunk; its own weights keep their `requires_grad`.
        layers: Numbers of the layers.

    Raises:
        ValueError: A layer has an adapter already.
    """
    added = []
    for number in range(len(trunk.layers)) if layers is None else layers:
        layer = trunk.layers[number]
        if hasattr(layer, "bottleneck"):
            raise ValueError(f"expected layers without a bottleneck adapter, got layer {number} with one")
        norm = layer.layer_norm1.weight
        adapter = Bottleneck(len(norm), hidden, starts_as_identity=starts_as_identity).to(norm.device)
        layer.bottleneck = adapter.train(layer.training)
        layer.register_forward_pre_hook(_adapt)
        added.append(adapter)
    return added


def _adapt(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.bottleneck(inputs[0]), *inputs[1:])
