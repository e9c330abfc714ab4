"""Layers that are computed again in the backward pass draw the dropout of the forward pass, by a key."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sam3lora.model.adapter import keyed_dropout
from sam3lora.model.adapter.keyed_dropout import dropout, dropout_from, new_key
from sam3lora.model.adapter.lora_products import take_over
from sam3lora.model.checkpointing import recomputed, recomputed_by_key, repeats_by_key

CPU = torch.device("cpu")


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.own_dropout, self.fc2 = nn.Linear(6, 8), nn.Dropout(0.0), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.fc2(self.own_dropout(self.fc1(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = Tower()


def adapted(share: float = 0.4, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["fc1", "fc2"], lora_dropout=share, **settings)
    model = get_peft_model(Model(), config).get_base_model()
    take_over(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.train()


def test_a_share_is_zero_and_the_others_are_larger():
    x = torch.full((100, 200), 3.0)
    torch.manual_seed(0)
    with dropout_from(new_key(CPU)):
        dropped, kept = dropout(x, 0.25)
    assert torch.equal(dropped, torch.where(kept, 4.0, 0.0))
    assert kept.float().mean() == pytest.approx(0.75, abs=0.01)


def test_a_key_gives_the_same_numbers_and_each_call_others():
    x, key, other_key = torch.ones(4, 50), new_key(CPU), new_key(CPU)

    def draw(key):
        with dropout_from(key):
            return [dropout(x, 0.5)[0] for _ in range(2)]

    first, second = draw(key)
    torch.manual_seed(0)  # of no consequence
    again, _ = draw(key)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(other_key)[0])


@pytest.mark.parametrize("by_key", [True, False])
def test_gradients_are_those_of_activations_that_are_kept(by_key):
    tower, x = adapted().vision_encoder, torch.randn(3, 6)

    def gradients(output, given):
        torch.manual_seed(8)  # between the passes others draw
        wanted = [given, *(one for one in tower.parameters() if one.requires_grad)]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted)]

    def computed_again():
        torch.manual_seed(7)
        given = x.clone().requires_grad_(True)
        if not by_key:
            return gradients(recomputed(tower, recomputed(tower, given)), given)
        with recomputed_by_key():
            output = recomputed(tower, recomputed(tower, given))
        return gradients(output, given)

    def kept():
        torch.manual_seed(7)
        output = given = x.clone().requires_grad_(True)
        for _ in range(2):
            if by_key:
                with dropout_from(new_key(CPU)):
                    output = tower(output)
            else:
                output = tower(output)
        return gradients(output, given)

    torch.testing.assert_close(computed_again(), kept())


def test_what_repeats_by_key(monkeypatch):
    def repeats(model):
        return repeats_by_key(model, "vision_encoder")

    model = adapted()
    assert repeats(model)
    model.vision_encoder.own_dropout.p = 0.1  # not an adapter's
    assert not repeats(model)
    assert repeats_by_key(model, "detr_encoder")  # not its business
    assert repeats(model.eval())
    assert not repeats(adapted(use_dora=True))  # PEFT's own forward
    compiled = adapted()
    compiled.vision_encoder.compile()
    assert not repeats(compiled)
    attending = adapted()
    attending.vision_encoder.attention_dropout = 0.1
    assert not repeats(attending)
    monkeypatch.setattr(keyed_dropout, "stateless", None)  # an older torch
    assert not repeats(adapted())
    assert repeats(adapted(share=0.0))
