"""Base models, read from disk once by the tests of a process: reading one is most of the time of many short tests."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

_MOST_KEPT = 6


def read_bases_once() -> None:
    """From now on, give copies of weights that were read before, from the same files in the same way.

    Before `sam3lora.model.loading` is imported it does nothing: not every test needs torch.
    """
    loading: Any = sys.modules.get("sam3lora.model.loading")
    if loading is not None and not isinstance(loading._load_weights, _Kept):
        loading._load_weights = _Kept(loading._load_weights)


class _Kept:
    def __init__(self, read: Callable[..., Any]) -> None:
        self._read = read
        self._models: dict[tuple[Any, ...], Any] = {}

    def __call__(self, folder: Any, config: Any, dtype: Any, attention: str) -> Any:
        files = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(folder.path.iterdir())]
        key = (*files, config.to_json_string(use_diff=False), dtype, attention)
        if key not in self._models:
            if len(self._models) == _MOST_KEPT:
                self._models.clear()
            self._models[key] = self._read(folder, config, dtype, attention)
        return copy.deepcopy(self._models[key])
