"""The vision trunk cut between two layers is the trunk; what comes before the first layer that learns keeps nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch

from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.checkpointing import enable_checkpointing
from sam3lora.model.staged.forward import StagedSam3, VisionFeatures
from sam3lora.model.staged.trunk import frozen_layers, token_type, unchanged_layers, weights_of_first_layers

from .conftest import RESOLUTION, randomise_adapter

NUM_LAYERS = 3
PIXELS = torch.randn(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1))


def adapt(sam3, last_layers: int) -> StagedSam3:
    """An adapter that has learned something, on the last layers of the trunk, in training mode."""
    settings = LoraSettings(
        rank=2,
        dropout=0.0,
        target_modules=("q_proj", "fc1"),
        components=("vision_encoder",),
        vision_last_layers=last_layers,
    )
    model = apply_lora(sam3, settings)
    randomise_adapter(model)
    return StagedSam3(model.train().get_base_model())


def same(one, other) -> bool:
    pairs = zip([*one.maps_ICHW, *one.positions_1CHW], [*other.maps_ICHW, *other.positions_1CHW], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bf16", [False, True])
def test_both_parts_are_the_whole(random_sam3, bf16):
    # The stock forward but for rounding, and to the last bit the same wherever the cut is.
    staged = StagedSam3(random_sam3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        stock = random_sam3.vision_encoder(PIXELS)
        tolerance = 0.05 if bf16 else 1e-5
        torch.testing.assert_close(staged.encode_trunk(PIXELS), stock.last_hidden_state, atol=tolerance, rtol=tolerance)
        whole = staged.encode_images(PIXELS)
        cuts = [staged.encode_trunk(PIXELS, layers) for layers in range(NUM_LAYERS + 1)]
        for layers, tokens in enumerate(cuts):
            assert same(staged.encode_rest(tokens, layers), whole)
        assert {tokens.dtype for tokens in cuts} == {token_type(random_sam3.vision_encoder.backbone)}
    assert not any(torch.equal(one, other) for one, other in pairwise(cuts))


@pytest.mark.parametrize(
    ("adapted", "expected"),
    [
        ([], 3),
        (["detr_encoder.layers.0.mlp.fc1", "vision_encoder.neck.fpn_layers.0.proj1"], 3),
        (["vision_encoder.backbone.layers.2.mlp.fc1", "vision_encoder.backbone.layers.1.attention.q_proj"], 1),
        (["vision_encoder.backbone.layers.0.mlp.fc1"], 0),
        (["vision_encoder.backbone.embeddings.patch_embeddings.projection"], 0),
    ],
)
def test_layers_before_the_first_adapted_module(adapted, expected):
    assert unchanged_layers(adapted, 3) == expected


def test_layers_before_the_first_that_learns_and_their_weights(random_sam3):
    trunk = random_sam3.requires_grad_(False).vision_encoder.backbone
    assert frozen_layers(trunk) == NUM_LAYERS
    trunk.layers[1].layer_norm2.bias.requires_grad_(True)
    assert frozen_layers(trunk) == 1
    trunk.embeddings.position_embeddings.requires_grad_(True)
    assert frozen_layers(trunk) == 0
    assert weights_of_first_layers(trunk, NUM_LAYERS).keys() == {
        name for name, _ in (*trunk.named_parameters(), *trunk.named_buffers())
    }
    before = weights_of_first_layers(trunk, 2)
    assert any(name.startswith("layers.1.") for name in before)
    assert not any(name.startswith("layers.2.") for name in before)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_frozen_layers_keep_nothing_for_the_backward_pass(random_sam3, checkpointed):
    # Gradients are those of the stock forward, and only the last layer runs with a graph.
    staged = adapt(random_sam3, last_layers=1)
    parameters = [p for p in random_sam3.parameters() if p.requires_grad]
    random_sam3.vision_encoder(PIXELS).fpn_hidden_states[0].square().sum().backward()
    expected = [p.grad.clone() for p in parameters]
    random_sam3.zero_grad()
    if checkpointed:
        enable_checkpointing(random_sam3, ["vision_encoder"])
    with_graph = []
    for layer in random_sam3.vision_encoder.backbone.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: with_graph.append(torch.is_grad_enabled()))
    staged.encode_images(PIXELS).maps_ICHW[0].square().sum().backward()
    assert with_graph == [False, False, True] + [True] * checkpointed  # once more in the backward pass
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def kept_bytes(model: torch.nn.Module, function: Callable[[], VisionFeatures]) -> int:
    """Of tensors that a function keeps for the backward pass, weights aside, each counted once."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = function().maps_ICHW
    assert maps[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_memory_grows_with_the_layers_that_learn(random_sam3):
    frozen = StagedSam3(random_sam3.requires_grad_(False))
    tokens = frozen.encode_trunk(PIXELS).requires_grad_()
    neck = kept_bytes(random_sam3, lambda: frozen.encode_neck(tokens))
    one, all_layers = (
        kept_bytes(staged.model, partial(staged.encode_images, PIXELS)) - neck
        for staged in (adapt(copy.deepcopy(random_sam3), last_layers) for last_layers in (1, NUM_LAYERS))
    )
    assert 0 < one < 0.4 * all_layers
