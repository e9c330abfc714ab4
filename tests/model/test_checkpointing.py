"""Where recomputing activations saves any. What it computes is in test_forward.py."""

from __future__ import annotations

from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.checkpointing import enable_checkpointing, worth_checkpointing
from sam3lora.model.components import COMPONENTS


def test_a_tower_begins_with_the_first_layer_that_learns(random_sam3):
    layers = random_sam3.vision_encoder.backbone.layers
    last = apply_lora(random_sam3, LoraSettings(rank=2, components=("vision_encoder",), vision_last_layers=2))
    assert enable_checkpointing(last, COMPONENTS) == 2
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, True]
    assert enable_checkpointing(last, ["text_encoder"]) == 0
    assert [layer.gradient_checkpointing for layer in layers] == [False, False, False]
    # All of them where the patch embedding learns.
    last.unload()
    random_sam3.requires_grad_(False)
    random_sam3.vision_encoder.backbone.embeddings.position_embeddings.requires_grad_(True)
    assert enable_checkpointing(random_sam3, COMPONENTS) == len(layers)


def test_components_before_the_first_that_learns_are_left_out(random_sam3):
    random_sam3.requires_grad_(False)
    assert worth_checkpointing(random_sam3, COMPONENTS) == ()
    random_sam3.detr_decoder.requires_grad_(True)
    assert worth_checkpointing(random_sam3, COMPONENTS) == ("detr_decoder", "mask_decoder", "scoring")
    assert worth_checkpointing(random_sam3, ["detr_encoder"]) == ()
    random_sam3.vision_encoder.neck.requires_grad_(True)
    behind = ("vision_encoder", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder", "scoring")
    assert worth_checkpointing(random_sam3, COMPONENTS) == behind
