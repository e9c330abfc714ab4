"""What errors say about the device."""

import pytest
import torch

from sam3lora.engine.device import is_device_error, is_out_of_memory


@pytest.mark.parametrize(
    ("meaning", "error"),
    [
        ("lost", torch.AcceleratorError("CUDA error: device-side assert triggered")),
        ("lost", RuntimeError("CUDA error: an illegal memory access was encountered")),
        ("lost", RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`")),
        ("lost", RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")),
        ("lost", RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")),
        ("full", torch.OutOfMemoryError("CUDA out of memory")),
        ("full", torch.AcceleratorError("CUDA error: out of memory")),
        ("full", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        ("full", MemoryError()),
        ("full", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        ("neither", RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")),
        ("neither", RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`")),
        ("neither", torch.AcceleratorError("CUDA error: invalid configuration argument")),
        ("neither", RuntimeError("mat1 and mat2 shapes cannot be multiplied")),
        ("neither", ValueError("CUDA error: of somebody who says so")),
    ],
)
def test_a_lost_device_a_full_one_and_the_error_of_one_request(meaning, error):
    assert is_device_error(error) == (meaning == "lost")
    assert is_out_of_memory(error) == (meaning == "full")
