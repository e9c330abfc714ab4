"""`DenseSam3`: the vision trunk of SAM 3 with a head that labels each pixel.

Shapes: `I` images, `S` patches of a square image, `C` channels of the trunk, `N` outputs, `g` patches to a side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam3lora.errors import UserError
from sam3lora.model.components import unwrap
from sam3lora.model.dense.bottleneck import add_bottlenecks
from sam3lora.model.dense.head import DenseHead
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.staged.trunk import first_layers, frozen_layers, keep_trunk_only, layer_outputs


class DenseSam3(nn.Module):
    """A trunk, plain or with adapters in it, and the head on some of its layers.

    Args:
        sam3: A `Sam3Model`, or the `PeftModel` around one. What a dense head does not use is taken out of it.
    """

    def __init__(self, sam3: nn.Module, settings: DenseSettings) -> None:
        super().__init__()
        keep_trunk_only(unwrap(sam3))
        self.sam3 = sam3
        self.settings = settings
        if settings.bottleneck_width is not None:
            add_bottlenecks(self.trunk, hidden=settings.bottleneck_width)
        self.dense_head = DenseHead(
            self.trunk.config.hidden_size,
            len(settings.classes),
            width=settings.width,
            num_layers=len(settings.layers),
            norm=settings.norm,
        )

    @property
    def trunk(self) -> Any:
        """The `Sam3ViTModel`."""
        return unwrap(self.sam3).vision_encoder.backbone  # type: ignore[union-attr]

    @property
    def constant_layers(self) -> tuple[int, ...]:
        """The layers whose output does not learn, as far as `encode` needs it; empty where the first layer learns."""
        return constant_layers(self.settings.layers, frozen_layers(self.trunk))

    def encode(self, pixel_values_ICHW: Tensor) -> list[Tensor]:
        """The outputs (I, S, C) of the head's layers, ascending; frozen layers keep no activations."""
        return self.encode_rest(self.encode_constant(pixel_values_ICHW))

    @torch.no_grad()
    def encode_constant(self, pixel_values_ICHW: Tensor) -> Tensor:
        """The outputs (I, layers x S, C) of `constant_layers` one after the other, or the input of the first layer."""
        tokens_ISC = first_layers(self.trunk, pixel_values_ICHW, 0)
        constant = layer_outputs(self.trunk, tokens_ISC, self.constant_layers)
        return torch.cat(constant, 1) if constant else tokens_ISC

    def encode_rest(self, constant: Tensor) -> list[Tensor]:
        """What `encode` returns, from what `encode_constant` returned."""
        layers, known = self.settings.layers, self.constant_layers
        parts = constant.chunk(max(len(known), 1), dim=1)
        outputs = dict(zip(known, parts, strict=False))
        start = known[-1] + 1 if known else 0
        later = [number for number in layers if number >= start]
        outputs |= zip(later, layer_outputs(self.trunk, parts[-1], later, start), strict=True)
        return [outputs[number] for number in layers]

    def bottlenecks(self) -> dict[str, Tensor]:
        """The weights of the trunk's bottlenecks, by their names in it; empty where there are none."""
        return {name: one for name, one in self.trunk.named_parameters() if ".bottleneck." in name}

    def logits(self, tokens_ISC: Sequence[Tensor], num_levels: int = 1) -> list[Tensor]:
        """Logits (I, N, s, s) of the sides s = 4g, 2g, g, from what `encode` returned."""
        return self.dense_head(tokens_ISC, num_levels)  # type: ignore[no-any-return]

    def forward(self, pixel_values_ICHW: Tensor) -> Tensor:
        """Logits (I, N, 4g, 4g)."""
        return self.logits(self.encode(pixel_values_ICHW))[0]


def constant_layers(layers: tuple[int, ...], frozen: int) -> tuple[int, ...]:
    """The layers to keep of a trunk whose first `frozen` do not learn: those that the head reads, and the last one."""
    last = min(frozen, layers[-1] + 1) - 1
    return tuple(sorted({number for number in layers if number <= last} | {last} - {-1}))


def chosen_layers(layers: str | Iterable[int], trunk: Any) -> tuple[int, ...]:
    """Layer numbers for `dense.layers`: of at most four the last ones with global attention, or the last.

    Raises:
        UserError: The trunk has no such layer.
    """
    num = len(trunk.layers)
    if layers == "last":
        return (num - 1,)
    if layers == "global":
        found = [number for number, layer in enumerate(trunk.layers) if layer.window_size == 0]
        return tuple(found[-4:]) or (num - 1,)
    numbers = tuple(int(number) for number in layers)
    if max(numbers) >= num:
        raise UserError(f"dense.layers names layer {max(numbers)}: this model has layers 0 to {num - 1}")
    return numbers
