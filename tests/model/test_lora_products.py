"""LoRA in few kernels gives PEFT's numbers: outputs and gradients of layers of one input."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

from sam3lora.model.adapter.lora_products import LoraLinear, adapters_cast_once, linear_outputs, take_over

NAMES = ("q_proj", "k_proj", "v_proj", "wide")


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.wide = nn.Linear(6, 11)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj, self.wide)]


def adapted(dropout: float = 0.0, **settings) -> nn.Module:
    """PEFT's layers as they come, with adapters that are not zero."""
    torch.manual_seed(0)
    settings = {"r": 3, "target_modules": list(NAMES)} | settings
    model = get_peft_model(Projections(), LoraConfig(lora_dropout=dropout, **settings)).get_base_model()
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def ours(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    take_over(made)
    return made


def together(model: nn.Module, x: Tensor) -> list[Tensor]:
    return linear_outputs([getattr(model, name) for name in NAMES], x)


def results(model: nn.Module, run, *, bf16: bool = False, x_requires_grad: bool = True) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed sum of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 6, generator=generator).requires_grad_(x_requires_grad)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = run(model, x)
    sum((one.float() * torch.randn(one.shape, generator=generator)).sum() for one in outputs).backward()
    found = {f"output {number}": one.detach() for number, one in enumerate(outputs)} | {"x": x.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in found.items() if value is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        bound = tolerance * value.float().abs().max().item()
        torch.testing.assert_close(actual[name].float(), value.float(), rtol=0, atol=bound, msg=name)


SETTINGS = {
    "one rank": {},
    "ranks and scalings of their own": {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"v_proj": 1}},
    "rank-stabilised": {"use_rslora": True},
    "some layers only": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"use_dora": True},
    "a bias": {"lora_bias": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("x_requires_grad", [True, False])
def test_outputs_and_gradients_are_those_of_peft(settings, x_requires_grad):
    # One layer at a time and all at once; in bf16 they differ by its rounding.
    model = adapted(**settings)
    expected = results(model, lambda module, x: module(x), x_requires_grad=x_requires_grad)
    rounded = results(model, lambda module, x: module(x), bf16=True, x_requires_grad=x_requires_grad)
    for run in (lambda module, x: module(x), together):
        assert_same(results(ours(model), run, x_requires_grad=x_requires_grad), expected)
        assert_same(results(ours(model), run, bf16=True, x_requires_grad=x_requires_grad), rounded, 0.02)


@pytest.mark.parametrize("settings", [SETTINGS["one rank"], SETTINGS["ranks and scalings of their own"]])
def test_casting_all_adapters_at_once_changes_nothing(settings):
    model = ours(adapted(**settings))
    expected = results(model, together, bf16=True)
    with adapters_cast_once(model, torch.bfloat16):
        actual = results(model, together, bf16=True)
        twice = results(model, lambda module, x: [one + two for one, two in zip(*[together(module, x)] * 2)], bf16=True)
    assert_same(actual, expected, 0.0)
    assert twice["q_proj.lora_A.default.weight"].dtype == torch.float32
    assert all(layer.copies is None for layer in model.modules() if isinstance(layer, LoraLinear))
    # Without autocast, or in the adapters' own type, they are used as they are.
    with adapters_cast_once(model, torch.float32):
        assert_same(results(model, together), results(ours(adapted(**settings)), together), 0.0)


@pytest.mark.parametrize(
    "names", [("q_proj", "v_proj"), ("k_proj", "q_proj"), ("k_proj", "v_proj"), ("v_proj", "wide")]
)
def test_any_layers_may_have_one_input(names):
    # In any order, with other layers between them, of different widths: each gets its own copies.
    model = ours(adapted())

    def run(module: nn.Module, x: Tensor) -> list[Tensor]:
        return linear_outputs([getattr(module, name) for name in names], x)

    expected = results(model, lambda module, x: [getattr(module, name)(x) for name in names], bf16=True)
    with adapters_cast_once(model, torch.bfloat16):
        assert_same(results(model, run, bf16=True), expected, 0.02)


def test_layers_of_different_dropout_share_none():
    model = ours(adapted(dropout=0.9))
    model.q_proj.lora_dropout["default"].p = 0.0
    x = torch.randn(5, 6)
    q, k = linear_outputs([model.q_proj, model.k_proj], x)
    model.eval()
    torch.testing.assert_close(q, model.q_proj(x))
    assert not torch.allclose(k, model.k_proj(x))


def test_several_backward_passes_add_up_through_the_copies():
    # As for chunks of prompts: each pass ends in the same copies.
    model = ours(adapted())
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))

    def loss(rows: Tensor) -> Tensor:
        return sum(one.float().square().sum() for one in together(model, rows))

    found = []
    for parts in ([x], [x[:1], x[1:]]):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), adapters_cast_once(model, torch.bfloat16):
            for part in parts:
                loss(part).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02 * found[0].abs().max().item())


def test_dropout_is_drawn_once_for_layers_of_one_input():
    # With equal adapters the layers' updates are equal, in training alone. Each element of the input is dropped with
    # the probability, the others are scaled up, and gradients pass where the input did.
    model = ours(adapted(dropout=0.25, target_modules=["q_proj", "k_proj"], r=1, lora_alpha=1))
    for layer in (model.q_proj, model.k_proj):
        nn.init.ones_(layer.lora_A["default"].weight)
        nn.init.ones_(layer.lora_B["default"].weight)
        nn.init.zeros_(layer.base_layer.weight)
        nn.init.zeros_(layer.base_layer.bias)
    x = torch.ones(4000, 6, requires_grad=True)
    q, k = linear_outputs([model.q_proj, model.k_proj], x)
    assert torch.equal(q, k)
    kept = q[:, 0].detach() * 0.75  # of six ones
    assert set(kept.round().int().tolist()) <= set(range(7))
    assert kept.mean().item() / 6 == pytest.approx(0.75, abs=0.01)
    q.sum().backward()
    assert (x.grad.ne(0).sum(1) == kept.round()).all()
    assert x.grad.amax().item() == pytest.approx(8 / 0.75)
    model.eval()
    assert linear_outputs([model.q_proj], x)[0].unique().tolist() == [6]


def test_gradients_in_float64():
    model = ours(adapted()).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: together(model, x), x)


def test_what_is_taken_over():
    # Plain LoRA on nn.Linear alone, under the same names of weights; PEFT's own forward runs for everything else.
    model = adapted()
    made = ours(model)
    assert {type(getattr(made, name)) for name in NAMES} == {LoraLinear}
    assert isinstance(made.q_proj, lora.Linear)
    assert list(made.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 6)
    for change in (lambda layer: layer.enable_adapters(False), lambda layer: layer.merge()):
        expected, actual = copy.deepcopy(model.q_proj), copy.deepcopy(made.q_proj)
        change(expected)
        change(actual)
        torch.testing.assert_close(linear_outputs([actual], x)[0], expected(x))
    # A hook on a layer still sees its input, once.
    seen: list[Tensor] = []
    made.k_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    together(made, x)
    assert len(seen) == 1
