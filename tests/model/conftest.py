"""Small random SAM 3 models, a base folder of one, as transformers would save it, and adapters on it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, Sam3Config, Sam3Model

from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import load_base

RESOLUTION = 112
WINDOW = 4


def small_config(image_size: int = RESOLUTION, **overrides) -> Sam3Config:
    """A SAM 3 with every kind of module and almost no width: 8x8 patches, windows of 4, the real four FPN levels."""
    parts = {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": image_size,
                "pretrain_image_size": 56,
                "patch_size": 14,
                "window_size": WINDOW,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 32,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": 520,
            "hidden_size": 32,
            "intermediate_size": 48,
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        },
    }
    detr = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "dropout": 0.0}
    parts["geometry_encoder_config"] = detr | {"num_layers": 1}
    parts["detr_encoder_config"] = dict(detr)
    parts["detr_decoder_config"] = detr | {"num_queries": 8}
    parts["mask_decoder_config"] = {"hidden_size": 32, "num_attention_heads": 4}
    return Sam3Config(**(parts | overrides))


def make_sam3(seed: int = 0, **overrides) -> Sam3Model:
    torch.manual_seed(seed)
    return Sam3Model(small_config(**overrides)).eval()


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: one token a byte."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


def make_inputs(batch: int = 2, side: int = RESOLUTION, geometry_cls: bool = True) -> dict[str, torch.Tensor]:
    """Inputs of the stock forward; one padding box adds the geometry CLS token."""
    generator = torch.Generator().manual_seed(1)
    encoded = byte_tokenizer()(["crack", "hole"][:batch], padding="max_length", max_length=32, return_tensors="pt")
    inputs = {"pixel_values": torch.randn(batch, 3, side, side, generator=generator), **encoded}
    if geometry_cls:
        inputs["input_boxes"] = torch.full((batch, 1, 4), -10.0)
        inputs["input_boxes_labels"] = torch.full((batch, 1), -10)
    return inputs


def outputs_of(model: torch.nn.Module, **inputs) -> dict[str, torch.Tensor]:
    names = ("pred_logits", "pred_boxes", "pred_masks", "presence_logits", "semantic_seg")
    with torch.no_grad():
        out = model(**(inputs or make_inputs()))
    return {name: getattr(out, name) for name in names}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    """Add noise to every weight: a freshly initialised model answers nearly the same to every prompt."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def randomise_adapter(model: torch.nn.Module, seed: int = 2) -> None:
    """Make B non-zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def write_adapter(
    base: Path, folder: Path, *, seed: int = 2, targets=("q_proj",), components=("detr_decoder",), **metadata
) -> Path:
    """An adapter on a base folder that does something, as after training."""
    loaded = load_base(str(base))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for A: the same in every process, whatever ran before
        model = apply_lora(loaded.model, LoraSettings(rank=2, components=components, target_modules=targets))
    randomise_adapter(model, seed)
    values = {"base_model": str(base), "base_fingerprint": loaded.fingerprint, "prompts": ["gear"]} | metadata
    return save_adapter(model, folder, AdapterMetadata(**values))


_MODEL = make_sam3()


def save_base(folder: Path, model: Sam3Model = _MODEL) -> Path:
    """Write a base folder as transformers would."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    processor = {"size": size, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    return folder


@pytest.fixture
def random_sam3() -> Sam3Model:
    """A fresh copy of one random model: tests may change it."""
    return copy.deepcopy(_MODEL)


@pytest.fixture(scope="session")
def saved_video_base(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as in a video checkpoint such as facebook/sam3: prefixed, with a tracker beside them."""
    folder = tmp_path_factory.mktemp("video") / "sam3"
    shutil.copytree(small_base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"detector_model.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {"tracker_model.weight": torch.zeros(2), "tracker_neck.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "sam3_video", "detector_config": json.loads((folder / "config.json").read_text())}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hooked(model: torch.nn.Module) -> set[str]:
    """Names of the modules that run something after their forward."""
    return {name for name, module in model.named_modules() if module._forward_hooks}
