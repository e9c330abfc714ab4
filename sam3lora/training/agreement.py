"""Workers agree before the first step: on the checkpoint to go on from, then on data, model and position of the run.

Each worker reads data, base model and checkpoint itself. On a host with an incomplete copy or a stale view of a shared
folder it would train on other images or go on from other weights, and no later step could notice that: workers exchange
gradients only.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from sam3lora import __version__
from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.training import distributed
from sam3lora.training.checkpoint_folders import is_complete, list_checkpoints

_LONGEST_WAIT_S = 60.0  # NFS keeps the names in a folder for up to 60 s (acdirmax)
_PACKAGES = ("torch", "transformers", "peft")
_NUM_NAMES = 3  # missing images that a message names


def choose_checkpoint(root: Path, known: str | None = None, *, longest_wait_s: float = _LONGEST_WAIT_S) -> Path | None:
    """The newest checkpoint that any worker sees, on all workers; None if none sees one.

    A worker that does not see it yet waits for it.

    Args:
        known: Name of the checkpoint with which the run was resumed; a newer one takes its place.

    Raises:
        UserError: On all workers alike, if some do not see it within `longest_wait_s`.
    """
    own = [path.name for path in list_checkpoints(root)[-1:]]
    names = [name for theirs in distributed.gather_objects(own) for name in theirs] + ([known] if known else [])
    if not names:
        return None
    chosen = root / max(names, key=lambda name: int(name.removeprefix("step_")))
    give_up_s = time.monotonic() + longest_wait_s
    while not (seen := is_complete(chosen)) and time.monotonic() < give_up_s:
        time.sleep(min(0.5, longest_wait_s))
        list_checkpoints(root)  # reading the folder anew makes NFS look up names again
    everywhere = distributed.gather_objects((socket.gethostname(), seen))
    blind = [f"host {host} (worker {rank})" for rank, (host, sees) in enumerate(everywhere) if not sees]
    if blind:
        raise UserError(
            f"{', '.join(blind)} cannot see checkpoint {chosen}, from which the run goes on: expected a folder that "
            "all hosts share. Check whether that host has mounted it, and how long it caches the names of files, then "
            "train again with --resume"
        )
    return chosen


def run_facts(config: Config, model: nn.Module, base: str, data: Mapping[str, str]) -> dict[str, str]:
    """What has to be the same on all workers before they exchange tensors, under names for people.

    Args:
        model: Names and shapes of its trainable weights count.
        base: Fingerprint of the base model's weights.
        data: Number and digest of images and labels.
    """
    shapes = [(name, tuple(parameter.shape)) for name, parameter in _trainable(model)]
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {
        **data,
        "base model": f"fingerprint {base[:12]}",
        "adapter shapes": f"{len(shapes)} [digest {_digest(repr(shapes).encode())}]",
        "settings": f"digest {_digest(settings.encode())}",
        "sam3lora": __version__,
        **{package: version(package) for package in _PACKAGES},
    }


def position_facts(model: nn.Module, step: int) -> dict[str, str]:
    """What has to be the same once the weights are restored: the trainable weights, and the step of the checkpoint."""
    weights = hashlib.blake2b()
    for name, parameter in _trainable(model):
        weights.update(name.encode())
        weights.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"step": str(step), "adapter weights": f"digest {weights.hexdigest()[:12]}"}


def check_agreement(
    facts: Mapping[str, str], file_names: Callable[[], Mapping[str, Sequence[str]]] = dict[str, Sequence[str]]
) -> None:
    """Compare the facts of all workers.

    Args:
        facts: From `run_facts` or `position_facts`. A worker with another version of sam3lora may have others.
        file_names: Makes fact -> the images behind it, to name those that a worker lacks.

    Raises:
        UserError: On all workers alike; it names what differs and on which hosts.
    """
    everywhere = distributed.gather_objects((socket.gethostname(), dict(facts)))
    first_host, first = everywhere[0]
    names = dict.fromkeys(name for _, theirs in everywhere for name in theirs)
    differing = [name for name in names if any(theirs.get(name) != first.get(name) for _, theirs in everywhere)]
    if not differing:
        return
    lacking = _lacking(file_names())
    lines = []
    for name in differing:
        line = f"{name}: {first.get(name, 'unknown')} on host {first_host} (worker 0)"
        for rank, (host, theirs) in enumerate(everywhere):
            if theirs.get(name) != first.get(name):
                line += f"; {theirs.get(name, 'unknown')} on host {host} (worker {rank})"
                line += f", which lacks {lacking[rank][name]}" if lacking[rank].get(name) else ""
        lines.append(line)
    raise UserError(
        "the workers disagree on what to train, so the run stopped before its first step. "
        f"{'. '.join(lines)}. All hosts need the same data, base model, checkpoints and packages: correct the host "
        "that differs, or use a folder that all share"
    )


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted((each for each in model.named_parameters() if each[1].requires_grad), key=lambda each: each[0])


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()[:12]


def _lacking(file_names: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """For each worker: fact -> some of the first worker's images that it lacks, as a text. Called on all workers."""
    everywhere = distributed.gather_objects(dict(file_names))
    found = []
    for theirs in everywhere:
        of_worker = {}
        for name, names in everywhere[0].items():
            missing = sorted(set(names) - set(theirs.get(name, ())))
            more = f" and {len(missing) - _NUM_NAMES} more" if len(missing) > _NUM_NAMES else ""
            of_worker[name] = ", ".join(missing[:_NUM_NAMES]) + more
        found.append(of_worker)
    return found
