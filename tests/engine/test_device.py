"""Precision by what the device computes in."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sam3lora.engine.device import find_precision
from sam3lora.errors import UserError

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def pretend_gpu(monkeypatch, *, bfloat16: bool) -> None:
    """A GPU that emulates bfloat16, as all do, and computes in it or not."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
    )


def test_the_default_is_bfloat16_only_where_the_gpu_computes_in_it(monkeypatch):
    pretend_gpu(monkeypatch, bfloat16=True)
    assert find_precision(None, GPU) == "bfloat16"
    pretend_gpu(monkeypatch, bfloat16=False)
    assert find_precision(None, GPU) == "float32"
    assert find_precision(None, CPU) == "float32"


def test_bfloat16_that_is_asked_for_is_refused_where_it_is_emulated(monkeypatch):
    pretend_gpu(monkeypatch, bfloat16=True)
    assert find_precision("bfloat16", GPU) == "bfloat16"
    pretend_gpu(monkeypatch, bfloat16=False)
    with pytest.raises(UserError, match=r"Tesla T4.*float32"):
        find_precision("bfloat16", GPU)
    assert find_precision("float32", GPU) == "float32"
    assert find_precision("bfloat16", CPU) == "bfloat16"
