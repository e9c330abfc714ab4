"""What the words of an error say about the device: whether less may succeed, and whether anything may."""

from __future__ import annotations

import torch

_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_DEVICE_SIGNS = ("cuda error", "cuda driver error", "triton error [cuda]", "cublas_status_", "cudnn_status_")
# A call was refused before anything ran: the next one may succeed.
_REFUSALS = ("not_supported", "bad_param", "invalid_value", "invalid argument", "invalid configuration")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at a time may succeed. The CPU's allocator and CUDA's libraries raise a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _has(error, _MEMORY_SIGNS)


def is_device_error(error: BaseException) -> bool:
    """Whether the device is of no more use to this process: after a failed kernel every later call fails as well."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error) or _has(error, _REFUSALS):
        return False
    return isinstance(error, torch.AcceleratorError) or _has(error, _DEVICE_SIGNS)


def _has(error: BaseException, signs: tuple[str, ...]) -> bool:
    words = str(error).lower()
    return any(sign in words for sign in signs)
