"""The device of a model: finding it, its precision, and what its errors mean."""

from __future__ import annotations

import torch

from sam3lora.errors import UserError

PRECISIONS = ("float32", "bfloat16")

_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_DEVICE_SIGNS = ("cuda error", "cuda driver error", "triton error [cuda]", "cublas_status_", "cudnn_status_")
# The library refused the call before anything ran: the next call may succeed.
_REFUSALS = ("not_supported", "bad_param", "invalid_value", "invalid argument", "invalid configuration")


def find_device(device: torch.device | str | None) -> torch.device:
    """The device that a user means, or a UserError; a number is a GPU's, None is a GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, str) and device.isdecimal() else device)
    except RuntimeError:
        raise UserError(f"device must be cpu, cuda, cuda:1 or a GPU's number, got {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {found} does not exist: this process sees {torch.cuda.device_count()} GPUs; use cpu")
    return found


def find_precision(precision: str | None, device: torch.device) -> str:
    """The precision that a user means, or a UserError; None is bfloat16 on a GPU that has it, else float32."""
    if precision is None:
        return "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
    if precision not in PRECISIONS:
        raise UserError(f"precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
    if precision == "bfloat16" and not has_bfloat16(device):
        raise UserError(f"precision is bfloat16, but {describe_gpu(device)} does not compute in it: use float32")
    return precision


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; a GPU before Ampere (T4, V100, RTX 20) emulates it and lacks convolutions.

    torch counts emulation unless it is told not to.
    """
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def describe_gpu(device: torch.device) -> str:
    return f"the GPU {torch.cuda.get_device_name(device)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed. The CPU's allocator and CUDA's libraries raise a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _has(error, _MEMORY_SIGNS)


def is_device_error(error: BaseException) -> bool:
    """Whether this process can no longer use the device: after a failed kernel every later call fails as well."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error) or _has(error, _REFUSALS):
        return False
    return isinstance(error, torch.AcceleratorError) or _has(error, _DEVICE_SIGNS)


def _has(error: BaseException, signs: tuple[str, ...]) -> bool:
    words = str(error).lower()
    return any(sign in words for sign in signs)
