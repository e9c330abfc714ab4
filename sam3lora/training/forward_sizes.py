"""Numbers of images and of prompts in a forward: which to try, and the largest that fit in memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence

import torch

from sam3lora.engine.device import is_out_of_memory

GPU_SHARE = 0.9
"""Of the free memory of a GPU, that a run may take."""

MOST_PROMPTS = 32
PIXELS_ON_CPU = 450_000
"""Of the prompts at a time on a CPU, where more save little time for their memory: 8 prompts at 224 x 224 pixels, 2 at
336 x 336, and 1 where even one has more pixels."""


def image_sizes(share: int) -> list[int]:
    """Numbers of images to try, each with fewer forwards for a worker's share of a step than the last."""
    return sorted({-(-share // forwards) for forwards in range(1, share + 1)})


def prompt_sizes(most: int) -> list[int]:
    """Numbers of prompts to try: powers of 2, and at last all that a forward has, up to `MOST_PROMPTS`."""
    most = min(most, MOST_PROMPTS)
    return sorted({min(2**power, most) for power in range(most.bit_length() + 1)})


def prompts_on_cpu(resolution: int) -> int:
    """How many prompts at a time a CPU is given for images of this side, without measuring: a power of 2."""
    return max(n for n in prompt_sizes(MOST_PROMPTS) if n == 1 or n * resolution**2 <= PIXELS_ON_CPU)


def largest_that_fits(
    images: Sequence[int],
    prompts: Sequence[int],
    num_queries: int,
    peak_bytes: Callable[[int, int], float],
    allowed: float,
) -> tuple[int, int]:
    """Numbers of images in a forward and of prompts at a time, of which `allowed` bytes are enough; (0, 0) for none.

    Prompts come first: a chunk of them starts about as many kernels as the vision trunk does, and an image of several
    prompts would take several chunks. The most prompts that fit with no more images than have so many, then the most
    images beside them. Many prompts are tried first, as they are measured fastest.

    Args:
        images, prompts: To choose from, in ascending order.
        num_queries: Prompts on an image.
        peak_bytes: Measures a number of images and of prompts.
    """
    for number in reversed(prompts):
        enough = (size for size in images if len(prompts) == 1 or size * num_queries >= number)
        fitting = next(enough, images[-1])
        if peak_bytes(fitting, number) <= allowed:
            break
    else:
        return 0, 0
    for size in images:
        if size > fitting:
            if peak_bytes(size, number) > allowed:
                break
            fitting = size
    return fitting, number


def allowed_on_gpu(workers: int, reserved_share: float) -> float:
    """Bytes that this process may reserve on its GPU, `workers` of which start now; the rest is for what varies.

    Args:
        reserved_share: Of the GPU, as Ray has reserved it: others may come to use the rest.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    # older versions of torch cannot tell
    limited_to = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    most = total * min(1.0, reserved_share, limited_to)
    return min(torch.cuda.memory_reserved() + GPU_SHARE * free / workers, GPU_SHARE * most)


def peak_on_gpu(backward: Callable[[int, int], None], num_images: int, max_prompts: int) -> float:
    """The most bytes that the allocator takes from the GPU; infinite where memory runs out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        backward(num_images, max_prompts)
        return torch.cuda.max_memory_reserved()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # cycles of the recomputed graph hold tensors that could not be given back otherwise
    return math.inf
