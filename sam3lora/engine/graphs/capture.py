"""Capturing: the operations of a function recorded once, and then started together.

What a function does in Python, such as choosing a shape or looking at a setting, happens at the capture and never
again. It may read no value of a tensor and copy nothing from or to the host.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

import torch

SWITCH = "SAM3LORA_CUDA_GRAPHS"
"""Environment variable: 0 leaves CUDA graphs out wherever nothing else is said."""

_OFF = ("0", "false", "no", "off")


def wants_cuda_graphs(setting: bool | None) -> bool:
    if setting is not None:
        return setting
    return os.environ.get(SWITCH, "1").strip().lower() not in _OFF


class Capturer(Protocol):
    """Records functions that read and write tensors whose memory stays."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats the operations of `function` on the same memory.

        What `function` has written is undefined until the first repetition.
        """
        ...


_ONE_AT_A_TIME = threading.Lock()  # of the process, as torch asks
MIN_FREE = 1 / 8
"""Share of a GPU's memory that captures leave free, for what runs without them."""


class CudaCapturer:
    """Captures CUDA graphs, which share the memory of their intermediate tensors.

    So they may run in any order only if nothing that one of them has made in its capture is read after another has run:
    results go to tensors from outside.

    A capture that would leave less than `MIN_FREE` raises torch.OutOfMemoryError.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        # Autocast would keep casts of trainable weights until its block ends; a graph must not read what is freed then.
        caches_casts = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with _ONE_AT_A_TIME, torch.cuda.device(self._device):
                self._warm_up(function)
                # cuBLAS keeps a workspace for each stream, and torch frees it with any graph of the stream: others then
                # read memory that is gone (https://github.com/pytorch/pytorch/issues/193402). Without a workspace the
                # capture makes one in the graphs' own memory, which stays as long as a graph does.
                torch._C._cuda_clearCublasWorkspaces()
                graph = torch.cuda.CUDAGraph()
                # Other threads of a service may use the GPU meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    function()
                torch._C._cuda_clearCublasWorkspaces()
                free, total = torch.cuda.mem_get_info()
        finally:
            torch.set_autocast_cache_enabled(caches_casts)
        if free < MIN_FREE * total:
            raise torch.OutOfMemoryError(f"a graph would leave {free >> 20} of {total >> 20} MiB")
        return graph.replay

    def _warm_up(self, function: Callable[[], None]) -> None:
        """Run on the stream of the capture: libraries set themselves up, which they could not during a capture."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)
