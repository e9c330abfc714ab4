"""Layers of SAM 3's ViT as ``Sam3ViTLayer`` computes them, in fewer kernels.

The tables of the rotary position encoding are made once for all layers, queries and keys are rotated together, and
projections of the same input are made together.

Shapes: ``I`` images, ``H`` ``W`` patches, ``C`` channels, ``N`` windows, ``S`` patches of a window, ``h`` heads, ``c``
channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.sam3.modeling_sam3 import window_partition, window_unpartition

from sam3lora.model.staged.attention import attend_projected, project


def run_layers(layers: Iterable[Any], tokens_IHWC: Tensor) -> Tensor:
    """The tokens after some consecutive ``Sam3ViTLayer``s; layers that are compiled run as they are."""
    rotations: dict[int, Tensor] = {}
    for layer in layers:
        if layer._compiled_call_impl is not None:
            tokens_IHWC = layer(tokens_IHWC)
            continue
        if layer.window_size not in rotations:
            rotations[layer.window_size] = _rotation_of(layer)
        run: Callable[..., Tensor] = partial(_layer, layer)
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            run = partial(layer._gradient_checkpointing_func, run)
        tokens_IHWC = run(tokens_IHWC, rotations[layer.window_size])
    return tokens_IHWC


def _layer(layer: Any, tokens_IHWC: Tensor, rotation_2S1c: Tensor) -> Tensor:
    for hook in layer._forward_pre_hooks.values():  # as where the layer is called
        (tokens_IHWC,) = hook(layer, (tokens_IHWC,))
    normed_IHWC = layer.layer_norm1(tokens_IHWC)
    windows_NSC, add_windows = _windows(normed_IHWC, layer.window_size)
    query, key, value = project(layer.attention, windows_NSC, windows_NSC, windows_NSC)
    query, key = _Rotation.apply(query, key, rotation_2S1c)  # type: ignore[no-untyped-call]
    attended_NSC = attend_projected(layer.attention, query, key, value)
    tokens_IHWC = add_windows(tokens_IHWC, attended_NSC)
    return tokens_IHWC + layer.dropout(layer.mlp(layer.layer_norm2(tokens_IHWC)))


def _windows(tokens_IHWC: Tensor, side: int) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Tokens by window (N, S, C), and a function that adds windows to tokens (I, H, W, C).

    A side of 0 makes one window of an image.
    """
    images, height, width, channels = tokens_IHWC.shape
    if side == 0:
        return tokens_IHWC.flatten(1, 2), lambda tokens, windows: tokens + windows.view_as(tokens)
    if height % side or width % side:  # windows with padding
        padded, size_hw = window_partition(tokens_IHWC, side)
        return (
            padded.flatten(1, 2),
            lambda tokens, windows: (
                tokens + window_unpartition(windows.unflatten(1, (side, side)), side, size_hw, (height, width))
            ),
        )
    rows, columns = height // side, width // side
    windows = tokens_IHWC.view(images, rows, side, columns, side, channels).transpose(2, 3)
    if torch.is_autocast_enabled(tokens_IHWC.device.type):  # one copy moves and casts
        dtype = torch.get_autocast_dtype(tokens_IHWC.device.type)
        windows = windows.to(dtype, memory_format=torch.contiguous_format)
    return windows.reshape(-1, side * side, channels), lambda tokens, windows: _SumWithWindows.apply(  # type: ignore
        tokens, windows, (images, rows, columns, side, side, channels)
    )


class _SumWithWindows(torch.autograd.Function):
    """Tokens (I, H, W, C) plus windows (N, S, C), of the given shape (I, rows, columns, side, side, C).

    No copy moves the windows: the sum reads them where they are, and the backward pass moves and casts by one copy.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, windows: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape, ctx.like = shape, (windows.shape, windows.dtype)
        moved = windows.view(shape).transpose(2, 3)
        return (tokens.view(moved.shape) + moved).view(tokens.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        images, rows, columns, side, _, channels = ctx.shape
        moved = gradient.view(images, rows, side, columns, side, channels).transpose(2, 3)
        shape, dtype = ctx.like
        return gradient, moved.to(dtype, memory_format=torch.contiguous_format).reshape(shape), None


@torch.no_grad()
def _rotation_of(layer: Any) -> Tensor:
    """Complex numbers (2, S, 1, c / 2) that turn each pair of channels, and their conjugates, which turn it back."""
    cosines_Sc, sines_Sc = layer.rotary_emb(layer.position_ids, layer.position_ids)
    cosines_Sp, sines_Sp = (one.reshape(len(layer.position_ids), 1, -1)[..., ::2] for one in (cosines_Sc, sines_Sc))
    return torch.stack([torch.complex(cosines_Sp, sign * sines_Sp) for sign in (1, -1)])


class _Rotation(torch.autograd.Function):
    """The rotary position encoding of queries and keys (N, S, h, c), in fp32 as in ``Sam3ViTRoPEAttention``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rotation)
        return _rotated(query, key, rotation[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor, Tensor, None]:
        [rotation] = ctx.saved_tensors
        return (*_rotated(d_query, d_key, rotation[1]), None)


def _rotated(query: Tensor, key: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.empty(2, *query.shape, dtype=torch.float32, device=query.device)
    torch.stack([query, key], out=both)
    torch.view_as_complex(both.unflatten(-1, (-1, 2))).mul_(factors)
    rotated_query, rotated_key = both.to(query.dtype).unbind()
    return rotated_query, rotated_key
