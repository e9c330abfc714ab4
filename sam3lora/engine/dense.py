"""The inference engine of dense prediction: one folder of task dense on its base, and the logits of images.

Evaluation, `Predictor` and batch jobs ask it. `engine.dense_maps` makes maps at the size of the image from logits.

Shapes: `N` outputs of the head, `h` `w` the size of its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sam3lora.data.batch import to_pixel_values
from sam3lora.data.images import resize_image
from sam3lora.engine.device import find_device, find_precision, is_out_of_memory
from sam3lora.engine.halving import run_in_halves
from sam3lora.engine.selection import NotFiniteError
from sam3lora.errors import UserError
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.dense.folder import load_dense, read_dense_metadata
from sam3lora.model.dense.model import DenseSam3
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.precision import store_matrices_in


class DenseEngine:
    """The model of a dense folder, for inference.

    Args:
        base: The base that ``model`` was built on.
        precision: "float32", or "bfloat16" to compute by autocast; None is bfloat16 on a GPU that has it.
    """

    def __init__(
        self, base: LoadedBase, model: DenseSam3, metadata: AdapterMetadata, *, precision: str | None = None
    ) -> None:
        self.base, self.model, self.metadata = base, model, metadata
        self.device = next(model.parameters()).device
        self.precision = find_precision(precision, self.device)
        if self.precision == "bfloat16":
            store_matrices_in(base.model, torch.bfloat16)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: str | None = None,
        *,
        revision: str | None = None,
        resolution: int | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        local_files_only: bool = False,
    ) -> DenseEngine:
        """Load a dense folder on its base.

        Args:
            model: "tiny", a hub id or a folder; None takes the folder's own base, at its revision.
            resolution: Side of the model's input in pixels; the folder fits only the one that it was trained at, which
                None takes.

        Raises:
            UserError: The folder is none of task dense or is damaged, the model cannot be loaded, or they do not belong
                together.
        """
        metadata = read_dense_metadata(folder)
        found = find_device(device)
        find_precision(precision, found)  # before the model is loaded, which may take long
        base = load_base(
            model or metadata.base_model or "tiny",
            revision=revision or (metadata.base_revision if model is None else None),
            device=found,
            resolution=metadata.resolution if resolution is None else resolution,
            local_files_only=local_files_only,
        )
        return cls(base, *load_dense(base, folder), precision=precision)

    @property
    def settings(self) -> DenseSettings:
        return self.model.settings

    def logits(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each image float32 (N, h, w), which cover the whole image.

        All images pass the model together, or in halves where memory runs out.

        Args:
            images: uint8 (H, W, 3) RGB of any sizes.

        Raises:
            UserError: Memory runs out for a single image.
            NotFiniteError: An output is NaN or infinite.
        """
        found = run_in_halves(self._attempt, list(images), lambda _: self.free_memory()) if images else []
        logits = [one for one in found if one is not None]
        if len(logits) < len(images):
            raise UserError(
                f"memory ran out for a single image at {self.base.resolution} pixels on {self.device}: end other "
                "programs that use it, or choose another --device"
            )
        if not all(np.isfinite(one).all() for one in logits):
            raise NotFiniteError("the outputs for this image are NaN or infinite")
        return logits

    def free_memory(self) -> None:
        """Give unused memory back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _attempt(self, images: list[np.ndarray]) -> list[np.ndarray] | None:
        try:
            return list(self._logits(images))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return None
            raise

    def _logits(self, images: list[np.ndarray]) -> np.ndarray:
        """float32 (I, N, h, w)."""
        side, base = self.base.resolution, self.base
        frames_IHWC = np.stack([resize_image(image, (side, side)) for image in images])
        pixel_type = next(self.model.trunk.parameters()).dtype
        pixel_values = to_pixel_values(frames_IHWC, base.image_mean, base.image_std, self.device, pixel_type)
        half = self.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            return self.model(pixel_values).float().cpu().numpy()  # type: ignore[no-any-return]
