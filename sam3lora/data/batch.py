"""A decoded batch as tensors. The only module of this package that imports torch.

Shapes: `I` images, `N` of them with pixels, `B` find queries, `T` packed targets, `C` channels, `H` `W` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sam3lora.losses import Targets

PIXEL_MEAN = PIXEL_STD = 0.5  # Sam3ImageProcessor


def to_pixel_values(
    images_IHWC: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalised images (I, 3, S, S) on `device` of uint8 (I, S, S, 3): (x / 255 - 0.5) / 0.5, there in float32.

    Bit for bit what `sam3lora.engine.pixels.to_pixel_values` gives, so that training, metrics and inference agree.
    """
    images = images_IHWC.to(device, non_blocking=True).permute(0, 3, 1, 2)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255 * PIXEL_STD).sub_(PIXEL_MEAN / PIXEL_STD).to(dtype)


@dataclass
class Batch:
    """Tensors of one batch, on the CPU and small: pixels are uint8 and masks are bits until they are asked for.

    Args:
        images_NHWC: uint8 (N, S, S, 3): an image whose features are in the store carries no pixels.
        image_rows_N: (N,) long, which images these are.
        feature_keys_I: Where the store keeps or is to get each image's features; None where they are not kept.
        image_ids: (I,) long.
        query_image_B: (B,) long, the image of each query.
        prompts_B: Prompt texts.
        categories_B: Category names, None for a prompt of the user's own negative list.
        is_positive_B: (B,) bool.
        num_B: (B,) long, targets of each query; query b owns consecutive rows of the packed targets.
        boxes_cxcywh_T4: (T, 4) float32, relative to the frame.
        masks_packed: (T, ceil(M * M / 8)) uint8, or None.
        mask_size: M, or None.
        mask_valid_T: (T,) bool.
        annotation_ids_T: (T,) long.
        original_sizes_hw: (I, 2) long, of the decoded images; as annotated for those without pixels.
        paths: Image files.
        skipped: (image id, path, reason) of images left out.
        epoch: Epoch of the plan.
        step: Step within the epoch.
    """

    images_NHWC: Tensor
    image_rows_N: Tensor
    feature_keys_I: list[str | None]
    image_ids: Tensor
    query_image_B: Tensor
    prompts_B: list[str]
    categories_B: list[str | None]
    is_positive_B: Tensor
    num_B: Tensor
    boxes_cxcywh_T4: Tensor
    masks_packed: Tensor | None
    mask_size: int | None
    mask_valid_T: Tensor
    annotation_ids_T: Tensor
    original_sizes_hw: Tensor
    paths: list[str]
    skipped: list[tuple[int, str, str]]
    epoch: int
    step: int

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def num_queries(self) -> int:
        return len(self.prompts_B)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU run beside other work."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned: dict[str, Any] = {name: v.pin_memory() for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **pinned)

    def pixel_values(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalised pixels (N, 3, S, S) on `device` of the images that carry them."""
        return to_pixel_values(self.images_NHWC, device, dtype)

    def masks(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Target masks (T, M, M) bool, unpacked on `device`; None when the batch carries boxes only."""
        if self.masks_packed is None or self.mask_size is None:
            return None
        if torch.device(device).type == "cpu":
            flat = np.unpackbits(self.masks_packed.numpy(), axis=1, count=self.mask_size**2)
            return torch.from_numpy(flat).view(torch.bool).view(-1, self.mask_size, self.mask_size)
        packed = self.masks_packed.to(device, non_blocking=True)
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
        bits = packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).flatten(1)
        return bits[:, : self.mask_size**2].reshape(-1, self.mask_size, self.mask_size).to(torch.bool)

    def targets(self, device: torch.device | str = "cpu") -> Targets:
        """Packed targets for `sam3lora.losses.Criterion`, on `device`."""
        from sam3lora.losses import Targets

        return Targets(
            num_B=self.num_B.to(device, non_blocking=True),
            boxes_cxcywh_T4=self.boxes_cxcywh_T4.to(device, non_blocking=True),
            masks_THW=self.masks(device),
            mask_valid_T=self.mask_valid_T.to(device, non_blocking=True),
        )


def collate(batch: dict[str, Any]) -> Batch:
    """Batch of `iterate_batches` or `stream_batches` -> tensors that share its memory."""
    return Batch(
        images_NHWC=_tensor(batch["images"]),
        image_rows_N=_tensor(batch["image_rows"]),
        feature_keys_I=batch["feature_keys"],
        image_ids=_tensor(batch["image_ids"]),
        query_image_B=_tensor(batch["query_image"]),
        prompts_B=batch["prompts"],
        categories_B=batch["categories"],
        is_positive_B=_tensor(batch["is_positive"]),
        num_B=_tensor(batch["num_targets"]),
        boxes_cxcywh_T4=_tensor(batch["boxes_cxcywh"]),
        masks_packed=None if batch["masks_packed"] is None else _tensor(batch["masks_packed"]),
        mask_size=batch["mask_size"],
        mask_valid_T=_tensor(batch["mask_valid"]),
        annotation_ids_T=_tensor(batch["annotation_ids"]),
        original_sizes_hw=_tensor(batch["original_sizes_hw"]),
        paths=batch["paths"],
        skipped=batch["skipped"],
        epoch=batch["epoch"],
        step=batch["step"],
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
