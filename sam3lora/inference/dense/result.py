"""`DenseResult`: what a dense folder says of an image. No torch here.

Shapes: `N` outputs of the head, `h` `w` the size of its logits, `H` `W` that of the image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.rle import encode_rle
from sam3lora.engine.dense_maps import best_labels, over_threshold, probability
from sam3lora.engine.mask_codes import Rle
from sam3lora.model.dense.settings import DenseSettings


@dataclass(eq=False)
class DenseResult:
    """The labels of one image; maps at the size of the image are made when asked for.

    Attributes:
        settings: Of the folder, with the threshold that counts.
        size_hw: Height and width of the image in pixels.
        logits_Nhw: float32, of the head.
        image_HW3: uint8 (H, W, 3) RGB, the image, where the caller wants to draw on it; otherwise None.
    """

    settings: DenseSettings
    size_hw: tuple[int, int]
    logits_Nhw: np.ndarray = field(repr=False)
    image_HW3: np.ndarray | None = field(default=None, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """In mode multiclass the first is the background."""
        return self.settings.classes

    @cached_property
    def label_HW(self) -> np.ndarray | None:
        """uint8 (H, W): 0 is background, 1 the first foreground class; None where classes may overlap."""
        if self.settings.mode == "multilabel":
            return None
        if self.settings.mode == "multiclass":
            return best_labels(self.logits_Nhw, self.size_hw)
        return over_threshold(self.logits_Nhw[0], self.size_hw, self.settings.threshold).astype(np.uint8)

    def probability(self, name: str) -> np.ndarray:
        """float32 (H, W) in [0, 1]: that of a class.

        Raises:
            UserError: There is no such class.
        """
        return probability(self.logits_Nhw, self.settings.number(name), self.size_hw, self.settings.mode)

    def mask(self, name: str) -> np.ndarray:
        """bool (H, W): the pixels of a class.

        Raises:
            UserError: There is no such class.
        """
        if self.label_HW is not None:
            return self.label_HW == self.settings.value(name)
        logits_hw = self.logits_Nhw[self.settings.number(name)]
        return over_threshold(logits_hw, self.size_hw, self.settings.threshold)

    def rle(self, name: str) -> Rle:
        """`mask` as a compressed COCO RLE `{"size": [height, width], "counts": str}`."""
        return encode_rle(self.mask(name))

    @cached_property
    def area_px(self) -> dict[str, int]:
        """Class -> its pixels."""
        return {name: int(np.count_nonzero(self.mask(name))) for name in self.classes}

    @property
    def area_share(self) -> dict[str, float]:
        """Class -> its share of the image, in [0, 1]."""
        num_pixels = self.size_hw[0] * self.size_hw[1]
        return {name: area / num_pixels for name, area in self.area_px.items()}

    def mean_probability(self, name: str) -> float:
        """How sure the head is of a class: the mean over its pixels, at the size of the logits; of none the largest."""
        small_hw = (self.logits_Nhw.shape[1], self.logits_Nhw.shape[2])
        small = DenseResult(self.settings, small_hw, self.logits_Nhw)
        probability_hw, mask_hw = small.probability(name), small.mask(name)
        return float(probability_hw[mask_hw].mean() if mask_hw.any() else probability_hw.max())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: name, pixels and share of each class."""
        share = self.area_share
        return {
            "classes": [
                {"name": name, "area_px": area, "share": round(share[name], 6)} for name, area in self.area_px.items()
            ]
        }

    def draw(self, path: str | Path | None = None) -> np.ndarray:
        """The image in the colours of its classes with a legend below, written if there is a path; see `draw_labels`.

        Raises:
            UserError: The file cannot be written.
        """
        from sam3lora.inference.dense.drawing import draw_labels
        from sam3lora.inference.result_pictures import write_picture

        picture_HW3 = draw_labels(self)
        if path is not None:
            write_picture(path, picture_HW3)
        return picture_HW3
