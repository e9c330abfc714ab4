"""The option `--device` of commands that use several GPUs of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sam3lora.errors import UserError


def gpu_indices(device: Sequence[str]) -> list[int]:
    """GPU numbers of `--device 0 1` or `--device 0,1`; none for `--device cpu`.

    Raises:
        UserError: Another word, a number twice, or cpu beside numbers.
    """
    words = [word for part in device for word in part.split(",")]
    if words == ["cpu"]:
        return []
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--device takes GPU numbers such as 0 1, or cpu; got {' '.join(device)}")
    gpus = [int(word) for word in words]
    if len(set(gpus)) < len(gpus):
        raise UserError(f"--device names a GPU twice: {' '.join(device)}")
    return gpus


def choose_gpus(device: Sequence[str], address: str | None) -> None:
    """Hide all other GPUs from Ray and torch by `CUDA_VISIBLE_DEVICES`.

    Numbers count among the GPUs that this process may see: `--device 0` is GPU 4 where a scheduler has set
    `CUDA_VISIBLE_DEVICES=4,5`.

    Raises:
        UserError: The work runs on a cluster (`address` or `RAY_ADDRESS`), or a number is too large.
    """
    cluster = address or os.environ.get("RAY_ADDRESS")
    if cluster and cluster != "local":
        raise UserError(
            f"--device chooses GPUs of this machine, but the work runs on the cluster {cluster}: give --num-workers "
            "instead"
        )
    gpus = gpu_indices(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        chosen = [str(gpu) for gpu in gpus]
    else:
        allowed = [name for name in visible.split(",") if name]
        if any(gpu >= len(allowed) for gpu in gpus):
            raise UserError(
                f"--device {' '.join(device)}: this process may see {len(allowed)} GPUs "
                f"(CUDA_VISIBLE_DEVICES={visible}), count from 0"
            )
        chosen = [allowed[gpu] for gpu in gpus]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
