"""A probe of a trial: time, memory and disk, measured with two real optimizer steps."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sam3lora.cluster import most_workers
from sam3lora.config import Config
from sam3lora.config.training import images_per_step
from sam3lora.data.batch import Batch
from sam3lora.data.images import ImageError
from sam3lora.engine.device import is_out_of_memory
from sam3lora.errors import OutOfMemory, RunFailed
from sam3lora.training.metrics_log import memory_mb
from sam3lora.training.step import StepCounts
from sam3lora.training.trainer import Trainer
from sam3lora.training.update import optimizer_step
from sam3lora.tune.run.capacity import trial_needs

_STEPS, _BATCHES = 2, 2


@dataclass(frozen=True)
class ImageCost:
    """Seconds per image: to read and decode it on one CPU, and to compute with it on the device."""

    decode_s: float = 0.0
    compute_s: float = 0.0

    def seconds(self, data_workers: int) -> float:
        """Seconds with this number of data tasks that decode ahead of a worker; 0 = the worker decodes itself."""
        return max(self.decode_s / data_workers, self.compute_s) if data_workers else self.decode_s + self.compute_s


@dataclass(frozen=True)
class Probe:
    """Measurements with one configuration.

    Attributes:
        start_s: Seconds until the first step: imports, model and data.
        train, valid: Cost of an image seen again, as in all epochs but the first: the caches are filled.
        first_train, first_valid: Cost of an image seen for the first time.
        metrics_s: Seconds per image to measure mAP and cgF1; None if they are not measured.
        num_measured: Images that they are measured on.
        memory_mb: Peak memory: of the GPU's allocator, else of this whole process.
        cache_bytes: Bytes per image of the caches on disk.
        uses_features: Whether images seen again came from cached vision features.
    """

    device: str
    num_train: int
    num_valid: int
    start_s: float
    train: ImageCost
    valid: ImageCost
    first_train: ImageCost
    first_valid: ImageCost
    metrics_s: float | None
    num_measured: int
    memory_mb: float
    cache_bytes: float
    uses_features: bool


def data_workers(config: Config) -> int:
    """Data tasks that decode ahead of each worker; 0 if the worker decodes itself, as it does without Ray."""
    return config.training.num_workers if config.scaling.num_workers else 0


def run_probe(config: Config) -> Probe:
    """Train two steps of one batch each and validate two batches, then the same images once more.

    In this process, without Ray and in a temporary folder. Gradients are not accumulated, which changes neither the
    time of an image nor the peak of memory.

    Raises:
        UserError: The settings or the data are wrong.
        RunFailed: The steps cannot be done as configured: too little memory (`OutOfMemory`), an unreadable image, a
            loss that is not finite. The message says what to change.
    """
    training, workers = config.training, max(1, most_workers(config))
    share = -(-images_per_step(training, workers) // workers)
    one_batch = share if training.batch_size == "auto" else min(share, training.batch_size)
    try:
        with tempfile.TemporaryDirectory(prefix="sam3lora-probe-") as folder, _threads_of_a_worker(config):
            changes = {
                "training.cache_dir": f"{folder}/cache",
                "training.gradient_accumulation_steps": 1,
                "training.images_per_step": one_batch,
                "scaling.num_workers": 0,
                "training.num_epochs": _STEPS,
                "output.output_dir": f"{folder}/run",
                "logging.tensorboard": False,
            }
            return _measure(config.changed(changes), Path(folder))
    except ImageError as error:
        raise RunFailed(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = config.training.batch_size
        raise OutOfMemory(
            f"out of memory with training.batch_size={size}: "
            + (f"set it to {size // 2}, or " if size != "auto" and size > 1 else "")
            + "set training.gradient_checkpointing=true, a lower training.max_prompts_per_forward, or "
            "model.dtype=bfloat16"
        ) from error


def _measure(config: Config, folder: Path) -> Probe:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run_dir = Path(config.output.output_dir)
    run_dir.mkdir()
    started = time.perf_counter()
    trainer = Trainer(config, run_dir, use_ray=False)
    start_s = _import_seconds() + time.perf_counter() - started
    first_train, first_valid = _train(trainer), _validate(trainer)
    loaded = trainer.runner.images.features_loaded
    train, valid = _train(trainer), _validate(trainer)
    uses_features = trainer.runner.images.features_loaded > loaded
    metrics_s, num_measured = _metrics(trainer)
    num_train, num_valid = len(trainer.data.train), trainer.batches.num_validated
    size = trainer.batches.images_per_step
    cache_bytes = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    num_visited = min(_STEPS * size, num_train) + min(_BATCHES * size, num_valid)
    return Probe(
        device=_device_in_words(trainer.device),
        num_train=num_train,
        num_valid=num_valid,
        start_s=start_s,
        train=train,
        valid=valid,
        first_train=first_train,
        first_valid=first_valid,
        metrics_s=metrics_s,
        num_measured=num_measured,
        memory_mb=memory_mb(trainer.device),
        cache_bytes=cache_bytes / num_visited,
        uses_features=uses_features,
    )


def _train(trainer: Trainer) -> ImageCost:
    """The cost of an image in the last of two steps, as the first one also warms up."""
    with contextlib.closing(trainer.batches.training_batches(0, 0)) as batches:
        return _cost(trainer, islice(batches, _STEPS), lambda batch: optimizer_step(trainer, [batch]))


def _validate(trainer: Trainer) -> ImageCost:
    if trainer.data.valid is None:
        return ImageCost()
    trainer.model.eval()
    with contextlib.closing(trainer.batches.validation_batches()) as batches:
        return _cost(
            trainer,
            islice(batches, _BATCHES),
            lambda batch: trainer.runner.evaluate(batch, StepCounts.of([batch]).normalizer()),
        )


def _cost(trainer: Trainer, batches: Iterator[Batch], compute: Callable[[Batch], Any]) -> ImageCost:
    """The cost of an image in the last batch that is not empty."""
    cost = ImageCost()
    decode_s, batch = _timed(trainer, lambda: next(batches, None))
    while batch is not None:
        if batch.num_images and trainer.runner.has_loss(batch):
            compute_s, _ = _timed(trainer, lambda: compute(batch))  # noqa: B023
            cost = ImageCost(decode_s / batch.num_images, compute_s / batch.num_images)
        decode_s, batch = _timed(trainer, lambda: next(batches, None))
    return cost


def _metrics(trainer: Trainer) -> tuple[float | None, int]:
    """Seconds per image to measure mAP and cgF1, and the number of images that a trial measures them on."""
    evaluation, data = trainer.config.evaluation, trainer.data.valid_complete
    if not evaluation.every_epochs or data is None:
        return None, 0
    num_images = min(evaluation.num_samples or len(data), len(data))
    num_probed = min(num_images, trainer.config.training.images_per_forward)
    trainer.validator.config = trainer.config.changed({"evaluation.num_samples": num_probed})
    seconds, _ = _timed(trainer, trainer.validator.metrics)
    return seconds / num_probed, num_images


def _timed(trainer: Trainer, call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - started, result


@contextlib.contextmanager
def _threads_of_a_worker(config: Config) -> Iterator[None]:
    """The CPU threads of a worker under Ray: the CPUs that it reserves, less those of its data tasks."""
    before = torch.get_num_threads()
    own = trial_needs(config, use_gpu=False)[0].get("CPU", 1.0)
    own -= data_workers(config)
    torch.set_num_threads(max(1, min(int(own), before)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _import_seconds() -> float:
    """Seconds that a new process needs to import the libraries of training."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import sam3lora.training.trainer"], check=False, capture_output=True)
    return time.perf_counter() - started


def _device_in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return f"the GPU ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"the CPU with {threads} thread{'s' * (threads != 1)}"
