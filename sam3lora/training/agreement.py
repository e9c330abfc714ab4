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
from sam3lora.training.checkpoints import is_complete, list_checkpoints

_LONGEST_WAIT_S = 60.0  # NFS keeps the names in a folder for up to 60 s (acdirmax)
_PACKAGES = ("torch", "transformers", "peft")
_NUM_NAMES = 3  # missing images that a message names


def choose_checkpoint(root: Path, *, longest_wait_s: float = _LONGEST_WAIT_S) -> Path | None:
    """The newest checkpoint that the first worker sees, on all workers; None if it sees none.

    A worker that does not see it yet waits for it.

    Raises:
        UserError: It does not appear within `longest_wait_s`.
    """

    def newest(_: list) -> str | None:
        saved = list_checkpoints(root)
        return saved[-1].name if saved else None

    name = distributed.on_first_worker(None, newest)
    if name is None:
        return None
    chosen = root / name
    give_up_s = time.monotonic() + longest_wait_s
    while not is_complete(chosen):
        if time.monotonic() >= give_up_s:
            raise UserError(
                f"host {socket.gethostname()} does not see checkpoint {chosen}, from which the first worker goes on: "
                "expected a folder that all hosts share. Look whether that host has mounted it, and how long it keeps "
                "the names of files, then train again with --resume"
            )
        time.sleep(min(0.5, longest_wait_s))
        list_checkpoints(root)  # reading the folder anew makes NFS look up names again
    return chosen


def worker_facts(config: Config, model: nn.Module, base: str, step: int, data: Mapping[str, str]) -> dict[str, str]:
    """What has to be the same on all workers, under names for people.

    Args:
        model: Its trainable weights count.
        base: Fingerprint of the base model's weights.
        step: Of the checkpoint.
        data: Number and digest of images and labels.
    """
    weights = hashlib.blake2b()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            weights.update(name.encode())
            weights.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {
        **data,
        "step": str(step),
        "adapter weights": f"digest {weights.hexdigest()[:12]}",
        "base model": f"fingerprint {base[:12]}",
        "settings": f"digest {hashlib.blake2b(settings.encode()).hexdigest()[:12]}",
        "sam3lora": __version__,
        **{package: version(package) for package in _PACKAGES},
    }


def check_agreement(facts: Mapping[str, str], file_names: Callable[[], Mapping[str, Sequence[str]]]) -> None:
    """Compare the facts of all workers.

    Args:
        facts: From `worker_facts`.
        file_names: Makes fact -> the images behind it, to name those that a worker lacks.

    Raises:
        UserError: On all workers alike; it names what differs and on which hosts.
    """
    everywhere = distributed.gather_objects((socket.gethostname(), dict(facts)))
    first_host, first = everywhere[0]
    differing = [name for name in first if any(theirs[name] != first[name] for _, theirs in everywhere)]
    if not differing:
        return
    lacking = _lacking(file_names())
    lines = []
    for name in differing:
        line = f"{name}: {first[name]} on host {first_host} (worker 0)"
        for rank, (host, theirs) in enumerate(everywhere):
            if theirs[name] != first[name]:
                line += f"; {theirs[name]} on host {host} (worker {rank})"
                line += f", which lacks {lacking[rank][name]}" if lacking[rank].get(name) else ""
        lines.append(line)
    raise UserError(
        f"the workers do not train the same run, so they stopped before a step. {'. '.join(lines)}. All hosts need the "
        "same data, base model, checkpoints and packages: mend the host that differs, or use a folder that all share"
    )


def _lacking(file_names: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """For each worker: fact -> some of the first worker's images that it lacks, as a text. Called on all workers."""
    everywhere = distributed.gather_objects(dict(file_names))
    found = []
    for theirs in everywhere:
        of_worker = {}
        for name, names in everywhere[0].items():
            missing = sorted(set(names) - set(theirs[name]))
            more = f" and {len(missing) - _NUM_NAMES} more" if len(missing) > _NUM_NAMES else ""
            of_worker[name] = ", ".join(missing[:_NUM_NAMES]) + more
        found.append(of_worker)
    return found
