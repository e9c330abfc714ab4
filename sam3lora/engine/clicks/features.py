"""Vision features that clicks can be answered from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sam3lora.model.staged.stage_outputs import VisionFeatures

if TYPE_CHECKING:
    from sam3lora.model.clicks.head import ClickFeatures


@dataclass
class ClickableFeatures(VisionFeatures):
    """Features of one image with what the click head reads of the same vision pass.

    Attributes:
        trunk_1SC: Tokens after all layers of the trunk. The first click on the image turns them into `clicks`, which
            take about the same memory.
        clicks: What the mask decoder reads.
    """

    trunk_1SC: Tensor | None = None
    clicks: ClickFeatures | None = None

    def tensors(self) -> list[Tensor]:
        own = [] if self.trunk_1SC is None else [self.trunk_1SC]
        return [*super().tensors(), *own, *(self.clicks.tensors() if self.clicks is not None else ())]
