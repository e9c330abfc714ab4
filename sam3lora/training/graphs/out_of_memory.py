"""What to do where memory runs out beside graphs, which keep what their stages leave for the backward pass."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from sam3lora.engine.device import is_out_of_memory

Result = TypeVar("Result")


class Graphed(Protocol):
    def give_up_graphs(self) -> bool:
        """Drop all graphs and make no more; whether there was anything to give up."""
        ...


logger = logging.getLogger(__name__)


def again_without_graphs(graphed: Graphed, compute: Callable[[], Result]) -> Result:
    """What `compute` returns. If memory runs out, graphs are given up for good and it is called once more.

    A batch was measured with the graphs of its own shapes, but shapes of later batches get graphs too.
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not graphed.give_up_graphs():
            raise
    # Not before here: the error held what the computation had made.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("out of memory: training goes on without CUDA graphs")
    return compute()
