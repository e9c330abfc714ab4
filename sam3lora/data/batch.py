"""`Batch`: images, find queries and targets, from the data task that decodes them to the loss.

A batch holds NumPy arrays, so that data tasks import no torch. Its methods that return tensors import torch.

Shapes: `I` images, `N` of them with pixels, `B` find queries, `T` packed targets, `C` channels, `S` `H` `W` pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3lora.data.bad_images import SkippedImage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sam3lora.losses import Targets

_OFFSET_FIELDS = ("image_rows_N", "query_image_B")  # positions among the images of their batch


@dataclass
class Batch:
    """The images of one batch with their queries and targets. Pixels are uint8 and masks are bits until they are used.

    Args:
        images_NHWC: uint8 (N, S, S, 3). An image whose features are in the store carries no pixels.
        image_rows_N: int64 (N,), which of the I images these are.
        feature_keys_I: Where the store keeps or is to keep each image's features; None where they are not kept.
        image_ids: int64 (I,).
        original_sizes_hw: int64 (I, 2), of the decoded images; as annotated for those without pixels.
        query_image_B: int64 (B,), the image of each query.
        num_B: int64 (B,), targets of each query, 0 for an absent prompt. Query b owns consecutive rows of the targets.
        exhaustive_B: bool (B,), False where the image may show more of what is asked for than the targets.
        boxes_cxcywh_T4: float32 (T, 4), relative to the frame.
        masks_packed: uint8 (T, ceil(M * M / 8)), the bits of (M, M) masks; None for boxes only.
        mask_size: M, or None.
        mask_valid_T: bool (T,), whether the target has a mask with at least one pixel.
        skipped: Images left out.
        label_maps: uint8 (I, N, M, M), see `label_maps.LabelMaps`; None where prompts are asked.
    """

    images_NHWC: np.ndarray
    image_rows_N: np.ndarray
    feature_keys_I: list[str | None]
    image_ids: np.ndarray
    paths: list[str]
    original_sizes_hw: np.ndarray
    query_image_B: np.ndarray
    prompts_B: list[str]
    num_B: np.ndarray
    exhaustive_B: np.ndarray
    boxes_cxcywh_T4: np.ndarray
    masks_packed: np.ndarray | None
    mask_size: int | None
    mask_valid_T: np.ndarray
    skipped: list[SkippedImage]
    epoch: int = 0
    step: int = 0
    label_maps: np.ndarray | None = None

    @classmethod
    def join(cls, parts: Sequence[Batch], *, epoch: int = 0, step: int = 0) -> Batch:
        """One batch of the images of several, in their order; `parts` is not empty."""
        first_image = np.cumsum([0, *(part.num_images for part in parts)])
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if field.name in _OFFSET_FIELDS:
                values = [value + start for value, start in zip(values, first_image, strict=False)]
            if isinstance(values[0], np.ndarray):
                joined[field.name] = np.concatenate(values)
            elif isinstance(values[0], list):
                joined[field.name] = [item for value in values for item in value]
            else:
                joined[field.name] = values[0]
        return cls(**joined | {"epoch": epoch, "step": step})

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def num_queries(self) -> int:
        return len(self.prompts_B)

    @property
    def query_T(self) -> np.ndarray:
        """int64 (T,): the query of each target."""
        return np.repeat(np.arange(self.num_queries), self.num_B)

    def target_rows(self, queries: slice) -> slice:
        """The rows of the targets that belong to consecutive queries."""
        start, stop, _ = queries.indices(self.num_queries)
        return slice(int(self.num_B[:start].sum()), int(self.num_B[:stop].sum()))

    @property
    def num_semantic(self) -> int:
        """Queries whose semantic target, the union of their masks, is not empty."""
        return len(np.unique(self.query_T[self.mask_valid_T]))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU run beside other work."""
        import torch

        pinned: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):  # the array that `numpy` returns keeps the page-locked tensor alive
                pinned[field.name] = torch.from_numpy(value).pin_memory().numpy()
        return replace(self, **pinned)

    def masks(self, device: torch.device | str = "cpu", rows: slice = slice(None)) -> Tensor | None:
        """Masks (T, M, M) bool of all targets or of some, unpacked on `device`; None when there are boxes only."""
        import torch

        if self.masks_packed is None or self.mask_size is None:
            return None
        side, own = self.mask_size, self.masks_packed[rows]
        if torch.device(device).type == "cpu":
            flat = np.unpackbits(own, axis=1, count=side**2)
            return torch.from_numpy(flat).view(torch.bool).view(-1, side, side)
        packed = torch.from_numpy(own).to(device, non_blocking=True)
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
        bits = packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).flatten(1)
        return bits[:, : side**2].reshape(-1, side, side).to(torch.bool)

    def targets(self, device: torch.device | str = "cpu", queries: slice = slice(None)) -> Targets:
        """The criterion's targets of all queries or of some consecutive ones, on `device`.

        Masks take an eighth of the memory until they are unpacked here, so that few queries at a time need less of it.
        """
        import torch

        from sam3lora.losses import Targets

        rows = self.target_rows(queries)
        num_B, boxes_T4, valid_T, exhaustive_B = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (
                self.num_B[queries],
                self.boxes_cxcywh_T4[rows],
                self.mask_valid_T[rows],
                self.exhaustive_B[queries],
            )
        )
        complete = self.exhaustive_B[queries].all()
        return Targets(num_B, boxes_T4, self.masks(device, rows), valid_T, None if complete else exhaustive_B)


def to_pixel_values(
    images_IHWC: np.ndarray,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalised images (I, 3, S, S) on `device` of uint8 (I, S, S, 3): (x / 255 - mean) / std, computed in float32.

    The same bits as `sam3lora.engine.features.to_pixel_values`, so that training, metrics and inference agree. Mean and
    standard deviation are per channel, of pixels in [0, 1].
    """
    import torch

    images = torch.from_numpy(images_IHWC).to(device, non_blocking=True).permute(0, 3, 1, 2)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (_by_channel(tuple(values), str(device)) for values in (image_mean, image_std))
    return pixels.div_(255).sub_(mean).div_(std).to(dtype or torch.float32)


@functools.cache
def _by_channel(values: tuple[float, ...], device: str) -> Tensor:
    """(3, 1, 1), sent to the device once."""
    import torch

    return torch.tensor(values, device=device).view(3, 1, 1)
