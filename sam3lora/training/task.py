"""What a run learns, as the training loop sees it: objects of prompts, a label for each pixel, or masks by clicks.

The loop, checkpoints, workers, resuming, sweeps and `auto` sizes are the same for every task and know only this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sam3lora.config import Config
from sam3lora.data.batch import Batch
from sam3lora.losses import Normalizer
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import LoadedBase

if TYPE_CHECKING:
    from sam3lora.training.datasets import BatchSource, RunData, Splits
    from sam3lora.training.validator import Validator


class Images(Protocol):
    """Encodes the images of a run and counts how."""

    vision_passes: int
    features_loaded: int

    def load_ahead(self, batch: Batch) -> None:
        """Read what is kept of a batch's images before its use; another thread calls this."""
        ...


class Runner(Protocol):
    """The loss of batches. A loss is NaN where it cannot be computed.

    `weights` has the factor of each term in the loss, `term_names` those of this run.
    """

    device: torch.device
    bf16: bool
    max_prompts: int

    @property
    def images(self) -> Images: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def term_names(self) -> list[str]: ...

    def forget_graphs(self) -> None:
        """Free what was kept to run again."""
        ...

    def give_up_graphs(self) -> bool:
        """The same for good; whether there was anything to give up."""
        ...

    def has_loss(self, batch: Batch) -> bool:
        """Whether there is anything to learn from the batch."""
        ...

    def backward(self, batch: Batch, normalizer: Normalizer) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the batch to the parameters; return the detached total and the terms."""
        ...

    def evaluate(self, batch: Batch, normalizer: Normalizer) -> dict[str, Tensor]:
        """The terms of the batch, the same ones as in training, without gradients."""
        ...


class WithoutGraphs:
    """The part of a `Runner` that keeps nothing to run again."""

    def forget_graphs(self) -> None:
        """There are none."""

    def give_up_graphs(self) -> bool:
        return False


class CostliestBackward(Protocol):
    """Computes gradients of images of the costliest kind, and discards them; `num_queries` prompts are on each."""

    num_queries: int

    @property
    def runner(self) -> Runner: ...

    def __call__(self, num_images: int, max_prompts: int) -> None: ...


class Task(Protocol):
    """The parts of a run that depend on what it learns.

    The model of a task is a module whose parameters that require a gradient are all that learns. `asks_prompts` tells
    whether an image may be asked for several things.
    """

    asks_prompts: bool

    def load_data(self, config: Config, resolution: int, patch_size: int, splits: Splits | None = None) -> RunData:
        """The splits of the run, from `read_splits` if they are read already; the sizes are the model's, in pixels."""
        ...

    def build(self, config: Config, base: LoadedBase, data: RunData, device: torch.device) -> tuple[nn.Module, Runner]:
        """What learns, on the base, and what computes its loss. ``data`` gets the feature cache."""
        ...

    def learning_rates(self, config: Config) -> dict[str, float]:
        """Component -> peak learning rate, where it is not `training.learning_rate`."""
        ...

    def metadata(self, config: Config, base: LoadedBase, data: RunData) -> AdapterMetadata: ...

    def costliest(self, model: Any, runner: Any, data: RunData, *, model_dropout: bool) -> CostliestBackward: ...

    def validator(
        self, config: Config, base: LoadedBase, model: Any, runner: Any, data: RunData, batches: BatchSource
    ) -> Validator: ...

    def deciding_metric(self, config: Config, data: RunData) -> tuple[str, str | None]:
        """The measurement that decides `best/`, and why it is not the configured one, if so."""
        ...

    def learned(self, model: Any) -> dict[str, Tensor]:
        """All that a checkpoint has to keep of the model, by name."""
        ...

    def restore(self, model: Any, tensors: dict[str, Tensor]) -> None:
        """Take what `learned` returned; names and shapes are the same."""
        ...

    def save(self, model: Any, folder: Path, metadata: AdapterMetadata) -> None:
        """Write the adapter folder whole, in place of one that is there."""
        ...


def task_of(config: Config) -> Task:
    if config.task == "dense":
        from sam3lora.training.dense.task import Dense

        return Dense()
    if config.task == "clicks":
        from sam3lora.training.clicks.task import Clicks

        return Clicks()
    from sam3lora.training.detection import Detection

    return Detection()
