"""LoRA on linear layers in few kernels: layers that read the same input share their dropout and one product with A.

    y_i = W_i x + b_i + s_i B_i (A_i D(x)),    D: dropout, drawn once for all layers i of one call

PEFT's `lora.Linear` computes this layer by layer, with a dropout for each and a kernel of its own for every cast, for
the scaling and for the sum. `LoraLinear` holds the same weights under the same names and takes over the forward where
the adapter is a plain one: one active adapter, not merged, no variant such as DoRA, on an `nn.Linear`. Everything else
stays PEFT's.

Shapes: `N` tokens, `n` layers of one input, `r` the rank, `R` the sum of the layers' ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sam3lora.model.adapter import keyed_dropout
from sam3lora.model.adapter.lora_casts import (
    AdapterCopies,
    Stacked,
    cast_and_stack,
    cast_each,
    copy_adapters,
    stacked_copies,
)
from sam3lora.model.components import component_of


class LoraLinear(lora.Linear):
    """PEFT's LoRA layer with the forward of this module; `copies` are those of `adapters_cast_once`."""

    copies: AdapterCopies | None = None

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        dtype = _type_of_products(self, x)
        if arguments or keywords or dtype is None:
            return super().forward(x, *arguments, **keywords)
        return _products([self], x, dtype)[0]


def take_over(model: nn.Module) -> None:
    """Make `LoraLinear`s of all of PEFT's LoRA layers on `nn.Linear`s; the weights and their names stay."""
    for module in model.modules():
        if type(module) is lora.Linear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = LoraLinear


def linear_outputs(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The output of each of the linear layers for the same input (..., in); those with a plain adapter share work."""
    x = lowered(x)  # once, and not in every layer
    outputs: dict[nn.Module, Tensor] = {}
    groups: dict[tuple[torch.dtype, float], list[LoraLinear]] = {}
    for layer in layers:
        dtype = _type_of_products(layer, x) if isinstance(layer, LoraLinear) else None
        if dtype is None:
            outputs[layer] = layer(x)
        else:
            plain = cast(LoraLinear, layer)
            groups.setdefault((dtype, _dropout(plain)), []).append(plain)
    for (dtype, _), group in groups.items():
        outputs |= zip(group, _products(group, x, dtype), strict=True)
    return [outputs[layer] for layer in layers]


def lowered(x: Tensor) -> Tensor:
    """fp32 in the type to which autocast casts the input of a linear layer; as it is without autocast."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


@contextmanager
def adapters_cast_once(
    model: nn.Module, dtype: torch.dtype, components: Collection[str] | None = None
) -> Iterator[None]:
    """Inside, all plain adapters of the model are used in copies of this type, which are made at once.

    `components` are those of whose adapters copies are made; None means all.

    A forward pass and its backward pass belong inside together, for recomputed layers use the copies again, and the
    adapters must not change inside. Gradients reach the adapters, cast back at once.
    """
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        and _plain_adapter(module)
        and (components is None or component_of(name) in components)
    ]
    weights = [_matrices(layer) for layer in layers]
    if all(a.dtype == b.dtype == dtype for a, b in weights):
        yield
        return
    try:
        for layer, copies in zip(layers, copy_adapters(weights, dtype), strict=True):
            layer.copies = copies
        yield
    finally:
        for layer in layers:
            layer.copies = None


def own_dropouts(model: nn.Module) -> set[nn.Module]:
    """The dropout modules in whose place a plain adapter's layer draws."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and _plain_adapter(module)]
    return {layer.lora_dropout[layer.active_adapters[0]] for layer in layers}


def _type_of_products(layer: LoraLinear, x: Tensor) -> torch.dtype | None:
    """The type in which the layer's products are computed; None where PEFT's own forward has to run."""
    name = _plain_adapter(layer)
    if name is None or torch.compiler.is_compiling():  # a compiler makes few kernels of PEFT's forward by itself
        return None
    base = cast(nn.Linear, layer.get_base_layer())
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type) if x.dtype != torch.float64 else None
    same = x.dtype == base.weight.dtype == layer.lora_A[name].weight.dtype
    return x.dtype if same else None


def _plain_adapter(layer: LoraLinear) -> str | None:
    """The name of the layer's one active adapter, if it is a plain one on a frozen layer that nobody watches."""
    names = layer.active_adapters
    if len(names) != 1 or layer.disable_adapters or layer.merged or layer.fan_in_fan_out:
        return None
    [name] = names
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    base = cast(nn.Linear, layer.get_base_layer())
    is_watched = any(module._forward_hooks or module._forward_pre_hooks for module in (layer, base))
    return None if is_watched or any(one.requires_grad for one in base.parameters()) else name


def _matrices(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of the layer's one active adapter."""
    [name] = layer.active_adapters
    return cast(Tensor, layer.lora_A[name].weight), cast(Tensor, layer.lora_B[name].weight)


def _dropout(layer: LoraLinear) -> float:
    module = layer.lora_dropout[layer.active_adapters[0]]
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0


def _products(layers: Sequence[LoraLinear], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Outputs of layers of one dropout; see `_type_of_products` for when this holds."""
    scalings: list[float] = []
    parameters: list[Tensor] = []
    copies = [layer.copies for layer in layers if layer.copies is not None and layer.copies.dtype == dtype]
    is_cast = len(copies) == len(layers)
    for number, layer in enumerate(layers):
        [name] = layer.active_adapters
        base = cast(nn.Linear, layer.get_base_layer())
        a, b = copies[number].a_b if is_cast else _matrices(layer)
        scalings.append(float(layer.scaling[name]))
        parameters += [base.weight, base.bias, a, b]
    stacked = stacked_copies(copies) if is_cast else None
    return _LoraProducts.apply(x, dtype, _dropout(layers[0]), scalings, stacked, *parameters)  # type: ignore


class _LoraProducts(torch.autograd.Function):
    """Forward and backward of the layers of one input.

    The scaling is a factor of the matrix products, sums are made in them, and where layers are alike, one batched
    product serves all of their B. `stacked` holds the A and B of all layers if the caller has them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        dropout: float,
        scalings: list[float],
        stacked: Stacked | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        weights = [weight.to(dtype) for weight in parameters[0::4]]
        biases = [None if bias is None else bias.to(dtype) for bias in parameters[1::4]]
        a_Ri, b_nor = stacked or cast_and_stack(parameters[2::4], parameters[3::4], dtype)
        ranks, sizes = [len(a) for a in parameters[2::4]], [len(weight) for weight in weights]
        x_Ni = x.to(dtype).reshape(-1, x.shape[-1])
        dropped_Ni, kept_Ni = keyed_dropout.dropout(x_Ni, dropout) if dropout else (x_Ni, None)
        reduced_NR = dropped_Ni @ a_Ri.t()

        y_No = [torch.empty(0)] * len(weights)
        alike = isinstance(b_nor, Tensor) and len(set(scalings)) == 1 and len(weights) > 1
        if alike:
            y_nNo = torch.empty(len(weights), len(x_Ni), sizes[0], dtype=dtype, device=x.device)
            y_No = list(y_nNo.unbind())
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            out = y_No[number] if alike else torch.empty(len(x_Ni), len(weight), dtype=dtype, device=x.device)
            if bias is None:
                torch.mm(x_Ni, weight.t(), out=out)
            else:
                torch.addmm(bias, x_Ni, weight.t(), out=out)
            y_No[number] = out
        if alike:
            y_nNo.baddbmm_(_by_layer(reduced_NR, ranks), cast(Tensor, b_nor).transpose(1, 2), alpha=scalings[0])
        else:
            for y, reduced_Nr, b, scaling in zip(y_No, reduced_NR.split(ranks, 1), b_nor, scalings, strict=True):
                y.addmm_(reduced_Nr, b.t(), alpha=scaling)

        b_or = [b_nor] if alike else list(b_nor)
        ctx.save_for_backward(dropped_Ni, kept_Ni, reduced_NR, a_Ri, *weights, *b_or)
        ctx.alike = alike
        ctx.ranks, ctx.scalings, ctx.dropout = ranks, scalings, dropout
        ctx.shape, ctx.type_of_x, ctx.type_of_adapter = x.shape, x.dtype, parameters[2].dtype
        return tuple(y.view(*x.shape[:-1], size) for y, size in zip(y_No, sizes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        num_layers = len(ctx.ranks)
        dropped_Ni, kept_Ni, reduced_NR, a_Ri, *others = ctx.saved_tensors
        weights, b_or = others[:num_layers], others[num_layers:]

        # products into empty tensors with beta 0: the scaling needs no kernel of its own
        d_reduced_NR = torch.empty_like(reduced_NR)
        if ctx.alike:
            [b_nor] = b_or
            d_y_nNo = torch.stack(d_outputs).flatten(1, -2)
            d_y_No, scaling = list(d_y_nNo.unbind()), ctx.scalings[0]
            _by_layer(d_reduced_NR, ctx.ranks).baddbmm_(d_y_nNo, b_nor, beta=0, alpha=scaling)
            reduced_nNr = _by_layer(reduced_NR, ctx.ranks)
            d_b_nor = torch.empty_like(b_nor).baddbmm_(d_y_nNo.transpose(1, 2), reduced_nNr, beta=0, alpha=scaling)
            d_b = list(d_b_nor.unbind())
        else:
            d_y_No = [d_y.reshape(-1, d_y.shape[-1]) for d_y in d_outputs]
            d_b = [torch.empty_like(b) for b in b_or]
            parts = zip(d_reduced_NR.split(ctx.ranks, 1), reduced_NR.split(ctx.ranks, 1), strict=True)
            for (d_reduced_Nr, reduced_Nr), d_y, b, one_d_b, scaling in zip(
                parts, d_y_No, b_or, d_b, ctx.scalings, strict=True
            ):
                d_reduced_Nr.addmm_(d_y, b, beta=0, alpha=scaling)
                one_d_b.addmm_(d_y.t(), reduced_Nr, beta=0, alpha=scaling)
        d_a_Ri = d_reduced_NR.t() @ dropped_Ni

        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = torch.empty_like(dropped_Ni).addmm_(d_reduced_NR, a_Ri, beta=0, alpha=1 / (1 - ctx.dropout))
            if kept_Ni is not None:
                d_x.mul_(kept_Ni)
            for d_y, weight in zip(d_y_No, weights, strict=True):
                d_x.addmm_(d_y, weight)
            d_x = d_x.view(ctx.shape).to(ctx.type_of_x)

        d_adapters = cast_each([*d_a_Ri.split(ctx.ranks), *d_b], ctx.type_of_adapter)
        d_parameters: list[Tensor | None] = []
        for d_a, one_d_b in zip(d_adapters[:num_layers], d_adapters[num_layers:], strict=True):
            d_parameters += [None, None, d_a, one_d_b]
        return (d_x, None, None, None, None, *d_parameters)


def _by_layer(values_NR: Tensor, ranks: Sequence[int]) -> Tensor:
    """A view (n, N, r), for layers of one rank."""
    return values_NR.unflatten(1, (len(ranks), -1)).transpose(0, 1)
