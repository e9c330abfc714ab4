"""The optimizer with its parameter groups, the learning rate schedules, and the training mode of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from sam3lora.model.components import component_of


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    component_learning_rates: Mapping[str, float] | None = None,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, one group per component and kind.

    Matrices and kernels decay; vectors (biases, DoRA magnitudes) do not. The schedule multiplies each group's
    ``peak_lr``.
    """
    rates = component_learning_rates or {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(component_of(name) or name.partition(".")[0], learning_rate)
            groups.setdefault((rate, parameter.dim() > 1), []).append(parameter)
    fused = any(parameter.is_cuda for parameters in groups.values() for parameter in parameters)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": weight_decay if decays else 0.0}
            for (rate, decays), parameters in groups.items()
        ],
        betas=betas,
        eps=epsilon,
        fused=fused,
    )


def learning_rate_factor(schedule: str, step: int, *, total_steps: int, warmup_steps: int) -> float:
    """The factor on the peak learning rate at ``step`` (0-based); always above 0.

    All schedules rise linearly over ``warmup_steps`` (at most half of the run: see `warmup_steps` of the configuration
    for a share of it). Then: ``constant`` stays,
    ``cosine`` falls to 1 % at the last step, ``inverse_sqrt`` falls with 1 / sqrt(1 + t / warm-up) and cools down
    linearly over the last ``warmup_steps``, as in SAM 3's recipe.
    """
    warmup = min(warmup_steps, total_steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - 1 - warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    assert schedule == "inverse_sqrt", schedule
    scale = max(1, warmup)
    return (1 + (step - warmup) / scale) ** -0.5 * min(1.0, (total_steps - step) / scale)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def set_training_mode(model: nn.Module, *, model_dropout: bool) -> None:
    """Training mode; unless ``model_dropout``, only the adapters' own dropout is active.

    SAM 3 has dropout of 0.1 in its DETR, geometry and scoring layers. In frozen layers it only adds noise to the
    predictions that are matched with targets.
    """
    model.train()
    if not model_dropout:
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and ".lora_dropout." not in name:
                module.eval()


def idle_adapters(model: nn.Module) -> list[str]:
    """Names of adapted modules whose gradient is zero after a first backward pass, so that they cannot learn.

    Only LoRA's B matrices count: A has no gradient as long as B is zero.
    """
    idle = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_B." in name and (parameter.grad is None or not parameter.grad.any()):
            idle.append(name.split(".lora_B.")[0].removeprefix("base_model.model."))
    return idle
