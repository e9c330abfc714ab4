"""What an adapter adds to a first call on a GPU, and whether attention is fused in inference and training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Sam3Model

from jobs.bench.gpu_cases import GpuCase
from jobs.bench.gpu_inference import Inference, base_model
from jobs.bench.gpu_timing import Row, Stopwatch, median_ms
from jobs.bench.gpu_training import Case, Inputs, Preset, Training
from jobs.bench.models import random_model
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.adapter.weights import read_adapter_weights

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def attention_cases(model_name: str, device: torch.device) -> Iterator[GpuCase]:
    """Whether inference and a training step run where attention may not fall back to whole matrices."""

    def infer() -> Row:
        asked = Inference.of(base_model(model_name, device), 2, device)
        return _runs_fused(lambda: asked.first_call(Stopwatch(device)))

    def train() -> Row:
        training = Training(random_model(model_name, device=device), "maximum")
        inputs = Inputs.draw(training.staged.model, Case(prompts=2, objects=1), device)
        return _runs_fused(lambda: training.step(inputs, 2))

    yield GpuCase({"work": "inference"}, infer)
    yield GpuCase({"work": "training"}, train)


def _runs_fused(run: Callable[[], object]) -> Row:
    try:
        with sdpa_kernel(FUSED):
            run()
    except RuntimeError as error:
        return {"attention": f"no: {str(error).splitlines()[0]}"}
    return {"attention": "fused everywhere"}


def adapter_cases(
    model_name: str, device: torch.device, *, repeats: int, presets: Sequence[str] = ("balanced", "maximum")
) -> Iterator[GpuCase]:
    """What an adapter adds to a first call with one prompt, by the bank of the server and by PEFT's own layers."""
    for preset in presets:
        yield GpuCase({"preset": preset}, partial(_adapter, preset, model_name, device, repeats))


def _adapter(preset: str, model_name: str, device: torch.device, repeats: int) -> Row:
    model = base_model(model_name, device)
    asked = Inference.of(model, 1, device)

    def call() -> float:
        return median_ms(lambda: asked.first_call(Stopwatch(device)), device, repeats=repeats)

    bare = call()
    with tempfile.TemporaryDirectory() as folder:
        peft = apply_lora(model, Preset.read(preset).lora)
        _randomise(peft)
        save_adapter(peft, folder, AdapterMetadata(base_model=model_name, prompts=["thing"]))
        with_peft = call()
        model = cast(Sam3Model, peft.unload())
        bank = AdapterBank(model, 1)
        bank.put(0, read_adapter_weights(folder, model, check_base=False))
    with bank.rows([0]):
        with_bank = call()
    return {
        "base ms": bare,
        "bank ms": with_bank,
        "bank adds %": 100 * (with_bank / bare - 1),
        "PEFT ms": with_peft,
        "PEFT adds %": 100 * (with_peft / bare - 1),
    }


def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
