"""Images to the model's input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sam3lora.data.images import resize_image


def to_pixel_values(
    images: Sequence[np.ndarray],
    resolution: int,
    *,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised images (I, 3, resolution, resolution): resized without regard to their shape, as SAM 3 does.

    Args:
        images: uint8 (H, W, 3) RGB, any sizes.
        resolution: Side of the model's input in pixels.
        image_mean: Per channel, of pixels in [0, 1].
        image_std: Per channel.
        device: Where they go.
        dtype: What they become.
    """
    if not images:
        return torch.zeros(0, 3, resolution, resolution, device=device, dtype=dtype)
    pixels_IHWC = np.stack([resize_image(image, (resolution, resolution)) for image in images])
    pixels_ICHW = torch.from_numpy(pixels_IHWC).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(list(values), device=device).view(3, 1, 1) for values in (image_mean, image_std))
    return ((pixels_ICHW - mean) / std).to(dtype)
