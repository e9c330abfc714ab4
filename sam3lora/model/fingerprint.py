"""The fingerprint of a base model's weights, by which an adapter recognises its base."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from sam3lora.model.components import bare_name, unwrap

SAMPLES_PER_TENSOR = 64
_OF_ADAPTERS = (".lora_", ".modules_to_save.", ".bottleneck.")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (64 hexadecimal digits) over names, shapes and sampled values of a model's parameters.

    Up to 64 evenly spaced values of each parameter count, rounded to bfloat16: the same weights in float32 and in
    bfloat16 have the same fingerprint, on any device and at any input resolution. Parameters of adapters are left out,
    so that a model with an unmerged adapter has the fingerprint of its base.

    Raises:
        ValueError: The model is on the meta device and has no values.
    """
    digest = hashlib.sha256()
    samples = []
    parameters = sorted(
        (bare_name(name), parameter)
        for name, parameter in unwrap(model).named_parameters()
        if not any(part in name for part in _OF_ADAPTERS)
    )
    for name, parameter in parameters:
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the weights before taking a fingerprint")
        digest.update(f"{name}{tuple(parameter.shape)};".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        samples.append(flat[::step][:SAMPLES_PER_TENSOR].to(torch.bfloat16))
    if samples:
        values = torch.cat(samples).view(torch.int16).cpu()
        digest.update(values.numpy().astype("<i2").tobytes())
    return digest.hexdigest()
