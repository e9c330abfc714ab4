"""Bottleneck adapters before the layers of the trunk, in the stock forward and in the staged one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Sam3Model, Sam3ViTConfig, Sam3ViTModel

from sam3lora.model.checkpointing import enable_checkpointing
from sam3lora.model.dense.bottleneck import add_bottlenecks
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.model.staged.trunk import frozen_layers, weights_of_first_layers

from ..conftest import RESOLUTION

PIXELS = torch.randn(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(1))


def adapted(sam3: Sam3Model, learned: bool = True, **options) -> Sam3Model:
    """All frozen but the adapters, which are as after training."""
    sam3.requires_grad_(False)
    torch.manual_seed(0)
    for adapter in add_bottlenecks(sam3.vision_encoder.backbone, **{"hidden": 8, **options}):
        if learned:
            torch.nn.init.normal_(adapter.up.weight, std=0.5)
            torch.nn.init.normal_(adapter.down.bias, std=0.5)
    return sam3


def tokens_of(sam3: Sam3Model) -> torch.Tensor:
    return StagedSam3(sam3).encode_trunk(PIXELS)


def stock_tokens_of(sam3: Sam3Model) -> torch.Tensor:
    return sam3.vision_encoder.backbone(PIXELS).last_hidden_state


@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_the_staged_forward_is_the_stock_one(random_sam3, bf16):
    plain = tokens_of(random_sam3)
    adapted(random_sam3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        staged, stock = tokens_of(random_sam3), stock_tokens_of(random_sam3)
    tolerance = 0.05 if bf16 else 1e-5
    torch.testing.assert_close(staged, stock, atol=tolerance, rtol=tolerance)
    assert (staged - plain).abs().max() > 0.5
    assert staged.dtype == plain.dtype


@torch.no_grad()
def test_start(random_sam3):
    # From the identity the model is its base, to the last bit; as the original starts, it is close to it.
    plain = tokens_of(random_sam3)
    own = fingerprint(random_sam3)
    small = tokens_of(adapted(copy.deepcopy(random_sam3), learned=False, starts_as_identity=False))
    assert 0 < (small - plain).abs().max() < 0.1
    same = adapted(random_sam3, learned=False)
    assert torch.equal(tokens_of(same), plain)
    assert fingerprint(same) == own


def test_formula(random_sam3):
    [adapter] = add_bottlenecks(random_sam3.vision_encoder.backbone, hidden=1, layers=[1])
    with torch.no_grad():
        adapter.down.weight.fill_(1 / 32)
        adapter.up.weight.copy_(torch.arange(32.0).view(32, 1))
    gelu = torch.nn.functional.gelu
    found = adapter(torch.full((1, 32), 2.0))
    torch.testing.assert_close(found, 2 + gelu(torch.arange(32.0) * gelu(torch.tensor(2.0)))[None])


def test_everything_learns_from_the_identity_on(random_sam3):
    # All but what the zeros hide: `down` learns from the second step on.
    sam3 = adapted(random_sam3, learned=False)
    tokens_of(sam3).square().sum().backward()
    gradients = {name: one.grad for name, one in sam3.named_parameters() if one.requires_grad}
    assert len(gradients) == 3 * 4
    for name, gradient in gradients.items():
        assert (gradient.abs().max() > 0) == (".up." in name), name


def test_checkpointed_layers_have_the_same_gradients(random_sam3):
    results = []
    for components in ((), ("vision_encoder",)):
        sam3 = adapted(copy.deepcopy(random_sam3)).train()
        assert enable_checkpointing(sam3, components) == (3 if components else 0)
        for forward in (tokens_of, stock_tokens_of):
            sam3.zero_grad()
            forward(sam3).square().sum().backward()
            results.append([one.grad for one in sam3.parameters() if one.requires_grad])
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)
    assert all(one.abs().max() > 0 for one in results[0])


def test_layers_before_the_first_adapter_are_frozen(random_sam3):
    trunk = adapted(random_sam3, layers=[2]).vision_encoder.backbone
    assert frozen_layers(trunk) == 2
    assert not any("bottleneck" in name for name in weights_of_first_layers(trunk, 2))
    assert any("bottleneck" in name for name in weights_of_first_layers(trunk, 3))


@torch.no_grad()
def test_a_copy_has_its_own_adapters(random_sam3):
    first = adapted(random_sam3)
    second = copy.deepcopy(first)
    plain = tokens_of(first)
    for layer in second.vision_encoder.backbone.layers:
        layer.bottleneck.up.weight.zero_()
    assert torch.equal(tokens_of(first), plain)
    assert not torch.equal(tokens_of(second), plain)


@torch.no_grad()
def test_adapters_of_a_base_in_bfloat16(random_sam3):
    sam3 = adapted(random_sam3.to(torch.bfloat16))
    adapter = sam3.vision_encoder.backbone.layers[0].bottleneck
    assert adapter.up.weight.dtype == torch.float32
    assert adapter(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_one_adapter_a_layer(random_sam3):
    adapted(random_sam3, layers=[1])
    with pytest.raises(ValueError, match="layer 1"):
        adapted(random_sam3)


def test_size_on_the_real_trunk():
    with torch.device("meta"):
        trunk = Sam3ViTModel(Sam3ViTConfig())
    count = sum(one.numel() for adapter in add_bottlenecks(trunk) for one in adapter.parameters())
    assert count == 32 * (2 * 32 * 1024 + 32 + 1024)  # 2.13 million
    assert all(one.is_meta for one in trunk.parameters())
