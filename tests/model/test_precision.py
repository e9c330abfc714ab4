"""Weights stored in bfloat16 give the numbers that autocast gives, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.components import COMPONENTS
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3

from .conftest import RESOLUTION, byte_tokenizer, randomise_adapter

EVERY_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "box_head", "instance_projection", "text_proj")
READ_LAYERS = ("projection", "proj1", "proj2", "ref_point_head")
WITHOUT_TEXT = tuple(component for component in COMPONENTS if component != "text_encoder")
CASES = {
    "detector": LoraSettings(rank=2, target_modules=("q_proj", "fc1"), components=("detr_encoder", "detr_decoder")),
    "everything": LoraSettings(rank=2, target_modules=EVERY_LAYER + READ_LAYERS, components=WITHOUT_TEXT),
    "last-layer": LoraSettings(rank=2, components=("vision_encoder",), vision_last_layers=1),
    "dora": LoraSettings(
        rank=2, target_modules=("q_proj", "fc1"), components=("vision_encoder", "detr_decoder"), use_dora=True
    ),
    "text": LoraSettings(rank=2, target_modules=EVERY_LAYER, components=COMPONENTS),
}


def outputs_and_gradients(staged: StagedSam3, *, text_trains: bool = False, bf16: bool = True) -> dict[str, Tensor]:
    """All that the loss is made of, with the adapter's dropout in training mode; and the adapter's gradients."""
    torch.manual_seed(3)
    pixels = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    encoded = byte_tokenizer()(["crack", "hole"], padding="max_length", max_length=32, return_tensors="pt")
    image_index, text_index = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=text_trains):
            text = staged.encode_text(encoded["input_ids"], encoded["attention_mask"])
        vision = staged.encode_images(pixels)
        found = staged.detect(vision, text, image_index, text_index, one_to_many=True)
        head = staged.mask_head(found, torch.tensor([0, 2]))
    outputs = {
        "logits": found.logits_LBQ,
        "boxes": found.boxes_cxcywh_LBQ4,
        "presence": found.presence_logits_LB,
        "logits_o2m": found.logits_o2m_LBQ,
        "boxes_o2m": found.boxes_o2m_LBQ4,
        "masks": head.instance_logits(torch.tensor([0, 2, 2]), torch.tensor([1, 3, 0])),
        "semantic": head.semantic_logits(torch.tensor([0, 2])),
    }
    sum((value.float() * torch.randn(value.shape)).sum() for value in outputs.values()).backward()
    trained = {name: p.grad for name, p in staged.model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()} | trained


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_bit_for_bit(random_sam3, case):
    settings = CASES[case]
    model = apply_lora(random_sam3, settings)
    randomise_adapter(model)
    stored = copy.deepcopy(model)
    text_trains = "text_encoder" in settings.components
    saved = store_matrices_in(stored, torch.bfloat16, text_tower=text_trains)
    expected, actual = (
        outputs_and_gradients(StagedSam3(one.train().get_base_model()), text_trains=text_trains)
        for one in (model, stored)
    )
    assert len(expected) > 10
    assert any(value.any() for name, value in expected.items() if "lora_A" in name)
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []
    weights = [sum(p.nbytes for p in one.parameters()) for one in (model, stored)]
    assert saved == weights[0] - weights[1] > 0


def test_matrices_take_half_the_memory(random_sam3):
    random_sam3.requires_grad_(False)
    random_sam3.detr_decoder.layers.requires_grad_(True)
    before = {name: parameter.dtype for name, parameter in random_sam3.named_parameters()}
    store_matrices_in(random_sam3, torch.bfloat16)
    assert set(before.values()) == {torch.float32}
    for component in (random_sam3.vision_encoder, random_sam3.detr_encoder, random_sam3.mask_decoder):
        for module in component.modules():
            wanted = torch.bfloat16 if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) else torch.float32
            assert {parameter.dtype for parameter in module.parameters(recurse=False)} <= {wanted}
    # What runs outside autocast has its precision, and what learns keeps its type.
    decoder = random_sam3.detr_decoder
    for part in (random_sam3.text_encoder, random_sam3.geometry_encoder, decoder.box_head, decoder.layers):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert store_matrices_in(random_sam3, torch.bfloat16) == 0
