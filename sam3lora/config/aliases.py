"""Other names in people's files: module aliases, renamed keys, and keys that are refused with advice."""

from __future__ import annotations

from collections.abc import Iterable

_OUTPUT = ("o_proj", "out_proj")

MODULE_ALIASES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "proj": _OUTPUT,
    "out_proj": _OUTPUT,
    "o_proj": _OUTPUT,
    "c_fc": ("fc1",),
    "linear1": ("fc1",),
    "c_proj": ("fc2",),
    "linear2": ("fc2",),
}
"""Spelling -> names of SAM 3's modules. SAM 3 has no fused qkv; only its text tower calls the output out_proj."""


def resolve_alias(name: str) -> tuple[str, ...]:
    """The module names that one entry of `lora.target_modules` stands for. At least one of them has to exist.

    >>> resolve_alias("qkv"), resolve_alias("fc1")
    (('q_proj', 'k_proj', 'v_proj'), ('fc1',))
    """
    return MODULE_ALIASES.get(name, (name,))


def resolve_target_modules(names: Iterable[str]) -> tuple[str, ...]:
    """All module names that a list of target modules stands for, each once, in the order given.

    >>> resolve_target_modules(["qkv", "q_proj", "proj", "box_head"])
    ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'out_proj', 'box_head')
    """
    return tuple(dict.fromkeys(module for name in names for module in resolve_alias(name)))


RENAMED_KEYS: dict[str, str] = {
    "evaluation.prob_threshold": "evaluation.threshold",
    "evaluation.detection_threshold": "evaluation.threshold",
}
"""Old key -> the key that has its meaning now. Old keys load everywhere a key is read."""

_SCALING = "write scaling.use_gpu (auto, true or false); sam3lora train --device 0 1 picks GPUs"
_METRICS = "write evaluation.every_epochs: 1 for metrics while training, or run sam3lora validate afterwards"
_HUB = "remove it; hf upload REPO <output_dir>/best publishes the adapter folder"
_SPLIT = "write training.data_dir (the folder that holds train/ and valid/), data.train_split and data.valid_split"

REFUSED_KEYS: dict[str, str] = {
    "model.cache_dir": "remove it and set the environment variable HF_HOME",
    "model.checkpoint": "write model.name with the folder of the checkpoint",
    "model.checkpoint_path": "write model.name with the folder of the checkpoint",
    "model.device": _SCALING,
    "lora.bias": "remove it; the biases of SAM 3 stay frozen",
    "training.train_data_path": _SPLIT,
    "training.val_data_path": _SPLIT,
    "training.train_dir": _SPLIT,
    "training.val_dir": _SPLIT,
    "training.device": _SCALING,
    "training.fp16": "write training.mixed_precision: bf16",
    "training.bf16": "write training.mixed_precision: bf16",
    "training.optimizer": "remove it; the optimizer is AdamW",
    "training.save_strategy": "write training.save_steps (a number of steps, or null for every epoch)",
    "training.evaluation_strategy": "write training.eval_steps (a number of steps, or null for every epoch)",
    "training.eval_strategy": "write training.eval_steps (a number of steps, or null for every epoch)",
    "output.logging_dir": "remove it; metrics.jsonl and plots/ are in output.output_dir",
    "output.save_lora_only": "remove it; only the adapter is saved, sam3lora export --merge writes the whole model",
    "output.push_to_hub": _HUB,
    "output.hub_model_id": _HUB,
    "evaluation.metric": _METRICS,
    "evaluation.metrics": _METRICS,
    "evaluation.save_predictions": "remove it; sam3lora validate always writes predictions.json",
    "evaluation.compute_metrics_during_training": _METRICS,
    "logging.logging_dir": "remove it; metrics.jsonl and plots/ are in output.output_dir",
    "logging.log_dir": "remove it; metrics.jsonl and plots/ are in output.output_dir",
    "logging.use_tensorboard": "write logging.tensorboard",
    "logging.use_wandb": "remove it; metrics.jsonl has every value, logging.tensorboard writes event files",
    "logging.wandb": "remove it; metrics.jsonl has every value, logging.tensorboard writes event files",
    "hardware.device": _SCALING,
    "hardware.devices": _SCALING,
    "hardware.num_gpus": "write scaling.num_workers",
    "hardware.num_workers": "write training.num_workers (data loading) or scaling.num_workers (training workers)",
    "hardware.mixed_precision": "write training.mixed_precision",
    "hardware.gradient_checkpointing": "write training.gradient_checkpointing",
    "hardware.dataloader_pin_memory": "remove it; memory is pinned when a GPU is used",
    "hardware.pin_memory": "remove it; memory is pinned when a GPU is used",
    "hardware.use_compile": "write training.compile",
}
"""Key of another trainer without effect here -> what to write instead."""

REFUSED_SECTIONS: dict[str, str] = {
    "hardware": "remove it; scaling (workers, GPUs) and training (precision, checkpointing) have these settings",
}
"""Section that does not exist here -> what to write instead; single keys of it are in `REFUSED_KEYS`."""
