"""Epochs of training with a frozen vision trunk, whose outputs are kept, beside stock transformers with PEFT."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from jobs.bench.our_training import make_runner, our_step, step_of
from jobs.bench.plain_training import PlainTraining
from jobs.bench.processes import Measured, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from jobs.bench.training_work import TrainingWork, criterion, tokenizer
from sam3lora.data.array_store import ArrayStore
from sam3lora.data.batch import Batch
from sam3lora.errors import UserError
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.training.features.trunk_cache import TrunkCache, frozen_part

CACHED, UNCACHED, PLAIN = "sam3lora", "sam3lora, nothing kept", "transformers + PEFT"
STORE_BYTES = 20 * 10**9
WARM_UP_IMAGE = 10**6


def compare_feature_cache(
    *,
    preset: str = "light",
    model: str = "small",
    num_images: int = 8,
    num_prompts: int = 4,
    epochs: int = 3,
    precision: Literal["fp32", "bf16"] = "fp32",
    num_threads: int | None = None,
) -> list[BenchReport]:
    """Time of the first epoch, which fills the cache, and of the later ones.

    The cache is a folder of its own and, within the preset's bound, memory. A step is a batch of the preset's size.
    Each way takes one step on another image before the first epoch. Ours trains all decoder layers and the one-to-many
    branch; the plain way cannot.

    Args:
        preset: One that adapts no part of the vision trunk.
        model: A configuration, filled with random weights.
        num_images: Of an epoch.
        num_prompts: On each image.
        epochs: The later ones' median counts.
        precision: "bf16" for bfloat16 autocast, all ways alike.
        num_threads: Of torch; None for its own number.

    Returns:
        The first epoch and a later one.

    Raises:
        UserError: A preset that adapts the vision encoder, no such preset or model, or fewer than two epochs.
    """
    if epochs < 2:
        raise UserError(f"epochs must be at least 2, as the first one fills the cache, got {epochs}")
    work = TrainingWork(preset, model, num_images, num_prompts, precision, geometry_cls=True)
    if work.config.lora.apply_to_vision_encoder:
        raise UserError(f"preset {preset} adapts the vision encoder, whose output then cannot be kept: try light")
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            CACHED: Work(_make_ours, {"work": work, "folder": Path(folder)}),
            UNCACHED: Work(_make_ours, {"work": work, "folder": None}),
            PLAIN: Work(_make_plain, {"work": replace(work, geometry_cls=False)}),
        }
        found = measure_in_turns(ways, rounds=epochs, warm_ups=0, num_threads=num_threads)
        kept_mb = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
    first = {name: measured.seconds[0] for name, measured in found.items()}
    later = {name: statistics.median(measured.seconds[1:]) for name, measured in found.items()}
    what = f"{num_images} images with {num_prompts} prompts each, preset {preset}, {model} with random weights"
    facts = {
        "precision": precision,
        "images in a step": _batch_size(work),
        "largest relative difference of an epoch's loss, kept and not": _difference(found),
    }
    return [
        _comparison(
            f"The first epoch of {what}", first, found, facts | {"passes of the vision trunk": _passes(found, 0)}
        ),
        _comparison(
            f"A later epoch of {what}",
            later,
            found,
            facts
            | {
                "passes of the vision trunk": _passes(found, -1),
                "MB kept of an image": round(kept_mb / num_images, 2),
                "seconds to open the cache": round(found[CACHED].results[0].set_up_s, 2),
            },
        ),
    ]


def _comparison(
    title: str, seconds: Mapping[str, float], found: Mapping[str, Measured], facts: Mapping[str, object]
) -> BenchReport:
    num_images = found[PLAIN].results[0].num_images
    return BenchReport(
        title=title,
        ways=[Timing(name, value) for name, value in seconds.items()],
        facts={
            **facts,
            "images/s": {name: round(num_images / value, 3) for name, value in seconds.items()},
            f"times as fast as {PLAIN}": {name: round(seconds[PLAIN] / value, 2) for name, value in seconds.items()},
        },
    )


@dataclass(frozen=True)
class _Epoch:
    """What an epoch did: the mean loss of its steps, and images that went through the trunk (None: not counted)."""

    loss: float
    num_images: int
    vision_passes: int | None = None
    set_up_s: float = 0.0


def _make_ours(work: TrainingWork, folder: Path | None) -> Callable[[], _Epoch]:
    model = work.adapted_model()
    opened_s = 0.0

    def open_trunk(staged: StagedSam3) -> TrunkCache:
        nonlocal opened_s
        assert folder is not None
        start = time.perf_counter()
        device, training = torch.device("cpu"), work.config.training
        memory_bytes = int(training.cache_memory_gb * 1e9)
        store = ArrayStore(folder, STORE_BYTES)
        frozen = frozen_part(staged, bf16=work.bf16)
        trunk = TrunkCache(frozen, store, device=device, bf16=work.bf16, memory_bytes=memory_bytes)
        opened_s = time.perf_counter() - start
        return trunk

    runner = make_runner(work, model, open_trunk=open_trunk if folder else None)
    step = our_step(work, model, runner)
    batches = _batches(work, kept=folder is not None)
    epoch = _epochs(step, batches)

    def run() -> _Epoch:
        before = runner.images.vision_passes
        found = epoch()
        return replace(found, vision_passes=runner.images.vision_passes - before, set_up_s=opened_s)

    return run


def _make_plain(work: TrainingWork) -> Callable[[], _Epoch]:
    model = work.adapted_model()
    plain = PlainTraining(model, tokenizer(), criterion(work), bf16=work.bf16)
    return _epochs(step_of(work, model, plain.backward), _batches(work, kept=False))


def _epochs(step: Callable[[Batch], float], batches: list[Batch]) -> Callable[[], _Epoch]:
    """The warm-up, on the last batch; then what runs an epoch of the others with the same dropout in every way."""
    *batches, warm_up = batches
    step(warm_up)
    done = 0

    def run() -> _Epoch:
        nonlocal done
        done += 1
        torch.manual_seed(done)
        losses = [step(batch) for batch in batches]
        return _Epoch(statistics.mean(losses), sum(batch.num_images for batch in batches))

    return run


def _batches(work: TrainingWork, *, kept: bool) -> list[Batch]:
    """An epoch, and one more batch of an image whose features are never kept."""
    size = _batch_size(work)
    starts = range(0, work.num_images, size)
    batches = [replace(work, num_images=min(size, work.num_images - s)).batch(first_image=s) for s in starts]
    if kept:
        for batch in batches:
            batch.feature_keys_I = [f"{image:064x}" for image in batch.image_ids.tolist()]
    return [*batches, replace(work, num_images=1).batch(first_image=WARM_UP_IMAGE)]


def _batch_size(work: TrainingWork) -> int:
    return work.config.training.images_per_forward


def _passes(found: Mapping[str, Measured], epoch: int) -> dict[str, int | None]:
    return {name: found[name].results[epoch].vision_passes for name in (CACHED, UNCACHED)}


def _difference(found: Mapping[str, Measured]) -> float:
    pairs = zip(found[CACHED].results, found[UNCACHED].results, strict=True)
    return max(abs(kept.loss / other.loss - 1) for kept, other in pairs)
