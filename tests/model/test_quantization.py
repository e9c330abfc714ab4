"""The base in 4 bits: what is quantised, that adapters on it learn, and that they fit the unquantised base."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from transformers import Sam3Model

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import AdapterMetadata, load_adapter, save_adapter
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.loading import load_base
from sam3lora.model.quantization import QUANTIZED, quantize_nf4
from sam3lora.model.staged.forward import StagedSam3

from .conftest import RESOLUTION, randomise_adapter, save_base, small_config
from .test_precision import outputs_and_gradients

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quantization)"
)
DETECTOR = LoraSettings(rank=2, target_modules=("q_proj", "fc1"), components=("vision_encoder", "detr_decoder"))


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A base whose vision trunk is wide enough for blocks of 64 weights, unlike its DETR; read only."""
    config = small_config()
    config.vision_config.backbone_config.hidden_size = 64
    config.vision_config.backbone_config.intermediate_size = 128
    torch.manual_seed(0)
    return str(save_base(tmp_path_factory.mktemp("wide") / "sam3", Sam3Model(config)))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_the_package_it_says_what_to_install(random_sam3):
    with pytest.raises(UserError, match=r"needs bitsandbytes .*sam3lora\[quantization\]"):
        quantize_nf4(random_sam3, "cpu")


def test_a_quantised_base_is_refused(small_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(small_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="quantised already"):
        load_base(str(folder), quantization="nf4")


@needs_bitsandbytes
def test_linear_layers_take_a_seventh_of_the_memory(wide_base):
    plain, quantized = (load_base(wide_base, quantization=kind) for kind in ("none", "nf4"))
    assert quantized.fingerprint == plain.fingerprint
    sizes = {"before": 0, "after": 0}
    for name, parameter in plain.model.named_parameters():
        found = quantized.model.get_parameter(name)
        if name.startswith(QUANTIZED) and parameter.dim() == 2 and parameter.shape[1] % 64 == 0:
            assert found.dtype == torch.uint8
            # Half the largest gap between the 16 values is 0.152 of a block's largest weight.
            assert (_dequantized(found) - parameter).abs().max() < 0.16 * parameter.abs().max()
            sizes["before"] += parameter.nbytes
            sizes["after"] += found.nbytes
        else:
            assert torch.equal(found, parameter)
    assert 0 < sizes["after"] < sizes["before"] / 7


@needs_bitsandbytes
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_learn_what_they_learn_on_the_dequantised_base(wide_base, use_dora):
    # Gradients through 4-bit layers are those of a float model with the same (dequantised) values, also after the
    # layers have been used for evaluation. In float32, so that rounding hides nothing.
    base = load_base(wide_base, quantization="nf4").model
    values = load_base(wide_base).model
    for name, parameter in base.named_parameters():
        if parameter.dtype == torch.uint8:
            values.get_parameter(name).data = _dequantized(parameter)
            base.get_submodule(name.rpartition(".")[0]).compute_dtype = torch.float32
    settings = LoraSettings(**{**DETECTOR.__dict__, "use_dora": use_dora, "dropout": 0.0})
    found = []
    for model in (values, base):
        torch.manual_seed(0)
        adapted = apply_lora(model, settings)
        randomise_adapter(adapted)
        staged = StagedSam3(adapted.get_base_model())
        with torch.no_grad():
            staged.encode_images(torch.zeros(1, 3, RESOLUTION, RESOLUTION))
        found.append(outputs_and_gradients(staged, bf16=False))
    expected, actual = found
    assert actual.keys() == expected.keys()
    gradients = [name for name in expected if ".lora_" in name]
    assert any(name.startswith("vision_encoder.backbone.layers.0") for name in gradients)
    for name, wanted in expected.items():
        assert (actual[name] - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, name


@needs_bitsandbytes
def test_the_adapter_goes_on_the_unquantised_base(wide_base, tmp_path):
    quantized, plain = load_base(wide_base, quantization="nf4"), load_base(wide_base)
    model = apply_lora(quantized.model, DETECTOR)
    randomise_adapter(model)
    metadata = AdapterMetadata(base_model=quantized.name, base_fingerprint=quantized.fingerprint, prompts=["crack"])
    save_adapter(model, tmp_path / "adapter", metadata)
    loaded, _ = load_adapter(plain.model, tmp_path / "adapter")
    saved = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert saved
    for name, parameter in loaded.named_parameters():
        if ".lora_" in name:
            assert torch.equal(parameter, saved[name])


@needs_bitsandbytes
def test_an_adapted_model_is_refused(random_sam3):
    apply_lora(random_sam3, DETECTOR)
    with pytest.raises(ValueError, match="carries an adapter"):
        quantize_nf4(random_sam3, "cpu")


def _dequantized(parameter: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(copy.copy(parameter).data, parameter.quant_state).float()  # type: ignore[attr-defined]
