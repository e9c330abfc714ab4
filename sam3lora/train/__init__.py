"""Training: the loop of one worker, and launching it with Ray Train.

``train(config, resume=False)`` runs a whole training and returns a ``TrainResult``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3lora.config import Config
    from sam3lora.train.launch import TrainResult

__all__ = ["train"]


def train(config: Config, *, resume: bool = False) -> TrainResult:
    """Train an adapter as the configuration says; see :func:`sam3lora.train.launch.train`."""
    from sam3lora.train.launch import train as launch

    return launch(config, resume=resume)


def __getattr__(name: str) -> Any:
    if name == "TrainResult":
        from sam3lora.train.launch import TrainResult

        return TrainResult
    raise AttributeError(name)
