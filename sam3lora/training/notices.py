"""Notices that a process, or its host, is about to be ended: the run saves a checkpoint before.

- SIGTERM to a process that trains without Ray, or to the one that waits for Ray's workers and passes it on by
  `STOP_FILE`: a checkpoint after the current step, and the run ends with `RunStopped`.
- SIGTERM to a worker of Ray: a checkpoint after the current step, and Ray starts all workers again from there
  (`WorkerStopped`).
- Ray drains a host of the run: a checkpoint at once and every `HOST_ENDS_SAVE_S`, until Ray starts the workers again.

A notice reaches one worker. Its flags travel with the gradients of a step, so that all workers act after the same one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sam3lora.errors import RunStopped, WorkerStopped
from sam3lora.training import distributed
from sam3lora.training.on_ray import ASK_RAY_S
from sam3lora.training.sigterm import STOP_FILE, handle_first, on_sigterm

HOST_ENDS_SAVE_S = 10.0
NUM_FLAGS = 3

logger = logging.getLogger(__name__)

_sigterm = threading.Event()  # set by the handler, which only the main thread of a process can install


class Notices:
    """What this worker was told, and what all workers know since the last step."""

    def __init__(self, output_dir: Path, *, use_ray: bool) -> None:
        self.use_ray = use_ray
        self.run_ends = self.worker_ends = self.host_ends = False
        self._stop_file = output_dir / STOP_FILE
        self._asked_s = time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM while the block runs."""
        _sigterm.clear()
        if self.use_ray:  # this is a thread; calls of the worker's actor run in its main thread, as does the handler
            import ray

            ray.get(ray.get_runtime_context().current_actor.__ray_call__.remote(_listen))
            yield
        else:
            with on_sigterm(_sigterm.set):
                yield

    def flags(self) -> list[float]:
        """What this worker knows: the run ends, the worker ends, it is time to ask Ray."""
        told, first = _sigterm.is_set(), distributed.rank() == 0
        run_ends = first and self._stop_file.exists() if self.use_ray else told
        ask = self.use_ray and first and not self.host_ends and time.monotonic() - self._asked_s >= ASK_RAY_S
        return [float(run_ends), float(told and self.use_ray), float(ask)]

    def agree(self, flags: Sequence[float]) -> None:
        """Take over the flags of all workers, a sum or a mean; called by all of them after the same step."""
        self.run_ends, self.worker_ends, ask = (flag > 0 for flag in flags)
        if ask:
            import ray.train

            self._asked_s = time.monotonic()
            self.host_ends = ray.train.get_preemption_info() is not None
            if self.host_ends and distributed.rank() == 0:
                logger.warning("a host of this run is about to be taken away: saving every %g s", HOST_ENDS_SAVE_S)

    @property
    def save_at_once(self) -> bool:
        return self.run_ends or self.worker_ends

    def obey(self, step: int) -> None:
        """End this worker if it was told so; called by all workers after the first one has saved.

        Raises:
            RunStopped: The run ends.
            WorkerStopped: Ray shall start the workers again.
        """
        if not self.save_at_once:
            return
        told = distributed.gather_objects(_sigterm.is_set())  # an error ends all workers, so the first has to be done
        if self.run_ends:
            raise RunStopped(
                f"stopped by SIGTERM after step {step}, which is saved: train again with --resume to go on"
            )
        ranks = ", ".join(str(rank) for rank, was_told in enumerate(told) if was_told)
        raise WorkerStopped(f"worker {ranks} was told to end by SIGTERM and stopped after step {step}, which is saved")


def _listen(actor: Any) -> None:
    handle_first(_sigterm.set)
