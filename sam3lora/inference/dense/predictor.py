"""`DensePredictor`: a dense folder asked for the labels of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.engine.dense import DenseEngine
from sam3lora.errors import UserError
from sam3lora.inference.dense.result import DenseResult
from sam3lora.model.dense.folder import read_dense_metadata
from sam3lora.model.dense.settings import DenseSettings


class DensePredictor:
    """The engine of a dense folder, and the threshold that counts.

    Args:
        settings: From `settings_of`; None takes those that the folder records.
        options: Of `DenseEngine.load`, like ``model``.

    Raises:
        UserError: The folder cannot be loaded.
    """

    def __init__(
        self, folder: str | Path, model: str | None = None, *, settings: DenseSettings | None = None, **options: Any
    ) -> None:
        self.folder = Path(folder)
        self.engine = DenseEngine.load(folder, model, **options)
        self.settings = self.engine.settings if settings is None else settings

    def predict(self, images: Sequence[np.ndarray]) -> list[DenseResult]:
        """The labels of images, which pass the model together: uint8 (H, W, 3) RGB of any sizes.

        Raises:
            UserError: Memory runs out for a single image, or an output is not finite.
        """
        return [
            DenseResult(self.settings, (image.shape[0], image.shape[1]), logits, image)
            for image, logits in zip(images, self.engine.logits(images), strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Model and settings, as JSON values."""
        base = self.engine.base
        values = {
            "model": base.name,
            "revision": base.revision,
            "adapter": str(self.folder),
            "resolution": base.resolution,
            "task": "dense",
            "mode": self.settings.mode,
            "classes": list(self.settings.classes),
        }
        return values if self.settings.mode == "multiclass" else values | {"threshold": self.settings.threshold}


def settings_of(folder: str | Path, asked: Mapping[str, Any]) -> DenseSettings:
    """What a dense folder records, with the settings that were given in their place.

    Args:
        asked: Settings of a question; None stands for one that was not given. `threshold` counts for classes that are
            each found by themselves, any other is refused.

    Raises:
        UserError: A setting has no effect or is out of range, or the folder is none of task dense.
    """
    recorded = read_dense_metadata(folder).dense
    assert recorded is not None
    settings = DenseSettings(**recorded)
    given = {name: value for name, value in asked.items() if value is not None}
    if settings.mode == "multiclass" and "threshold" in given:
        raise UserError(
            f"threshold has no effect with {folder}: each pixel has the most probable of its classes, leave it out"
        )
    if without := sorted(given.keys() - {"threshold"}):
        raise UserError(f"{without[0]} has no effect with {folder}, which labels each pixel: leave it out")
    return DenseSettings(**(settings.to_dict() | given))
