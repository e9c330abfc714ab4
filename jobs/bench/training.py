"""One step of training, from uint8 images to updated adapter weights, beside stock transformers with PEFT."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from jobs.bench.our_training import OurSettings, make_runner, our_step, step_of, wanted_checkpointing
from jobs.bench.plain_training import PlainTraining
from jobs.bench.processes import Measured, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from jobs.bench.tensor_memory import TensorMemory
from jobs.bench.training_work import TrainingWork, criterion, gradients, normalizer, tokenizer
from sam3lora.data.batch import Batch
from sam3lora.model.components import COMPONENTS

OURS, SAME_LOSS = "sam3lora", "sam3lora, same loss"
PLAIN, WHOLE_IMAGES = "transformers + PEFT", "transformers + PEFT, an image's prompts at once"
VARIANTS = {
    f"sam3lora, {kind}{', 1 prompt at a time' if size else ''}": OurSettings(components, size)
    for kind, components in {
        "no checkpointing": (),
        "checkpointing the vision encoder": ("vision_encoder",),
        "checkpointing all": COMPONENTS,
    }.items()
    for size in (None, 1)
}


def compare_train_step(
    preset: str = "full",
    *,
    model: str = "small",
    num_prompts: int = 4,
    num_images: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    rounds: int = 3,
    variants: bool = False,
    num_threads: int | None = None,
) -> BenchReport:
    """Time and memory of a step without kept features: forward, loss, backward, clipping, AdamW.

    Ours is the preset's training: losses of all decoder layers, the one-to-many branch, the geometry CLS token, its
    checkpointing. The second row does what the plain way does and no more; there loss and gradients are compared,
    without dropout. Images are uint8 arrays in memory.

    Args:
        preset: Of the configuration; it decides the adapter and how ours trains.
        model: A configuration, filled with random weights.
        num_prompts: On each image.
        num_images: Of a step.
        precision: "bf16" for bfloat16 autocast, all ways alike.
        rounds: Steps; the median counts.
        variants: Also measure other checkpointing, smaller chunks of prompts, and the plain way with all prompts of an
            image in one forward. All of them stand in memory at the same time: some 40 GB for the small model.
        num_threads: Of torch; None for its own number.

    Raises:
        UserError: No such preset or model, or a number below 1.
    """
    work = TrainingWork(preset, model, num_images, num_prompts, precision)
    # In a process of its own, whose memory is gone when times are measured.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        agreement = pool.submit(_agreement, work).result()
    as_preset = replace(work, geometry_cls=True)
    ways = {
        OURS: Work(_make_ours, {"work": as_preset, "settings": OurSettings()}),
        SAME_LOSS: Work(_make_ours, {"work": work, "settings": OurSettings(same_loss=True)}),
        PLAIN: Work(_make_plain, {"work": work, "whole_images": False}),
    }
    if variants:
        ways[WHOLE_IMAGES] = Work(_make_plain, {"work": work, "whole_images": True})
        ways |= {name: Work(_make_ours, {"work": as_preset, "settings": chosen}) for name, chosen in VARIANTS.items()}
    found = measure_in_turns(ways, rounds=rounds, num_threads=num_threads)
    return BenchReport(
        title=f"A step of {num_images} image{'s' if num_images > 1 else ''} with {num_prompts} prompts each, preset "
        f"{preset}, {model} with random weights at {work.resolution} pixels",
        ways=[Timing(name, measured.median, _beyond(measured, "set_up_mib")) for name, measured in found.items()],
        facts={
            "precision": precision,
            "checkpointing of sam3lora": ", ".join(wanted_checkpointing(work, OurSettings())) or "none",
            "images/s": {name: round(num_images / measured.median, 3) for name, measured in found.items()},
            f"times as fast as {PLAIN}": {
                name: round(found[PLAIN].median / measured.median, 2) for name, measured in found.items()
            },
            "peak memory with the weights, MiB": {name: _beyond(found[name], "imported_mib") for name in found},
            f"peak memory with the weights, share of {PLAIN}": _shares(found, "imported_mib"),
            f"peak memory without the weights, share of {PLAIN}": _shares(found, "set_up_mib"),
            "peak of the tensors of a step, MiB": {name: round(found[name].results[0].tensors_mib) for name in found},
            **agreement,
        },
    )


@dataclass(frozen=True)
class _Memory:
    """MiB that the process held when everything was imported, and when the model stood; the most that the tensors of a
    step take, which is less than what the process holds: the C library's allocator keeps what is freed.
    """

    imported_mib: float
    set_up_mib: float
    tensors_mib: float


def _make_ours(work: TrainingWork, settings: OurSettings) -> Callable[[], _Memory]:
    imported_mib = _resident_mib()
    model = work.adapted_model()
    return _rounds(work, our_step(work, model, make_runner(work, model, settings)), imported_mib)


def _make_plain(work: TrainingWork, whole_images: bool) -> Callable[[], _Memory]:
    imported_mib = _resident_mib()
    model = work.adapted_model()
    plain = PlainTraining(model, tokenizer(), criterion(work), bf16=work.bf16, whole_images=whole_images)
    return _rounds(work, step_of(work, model, plain.backward), imported_mib)


def _rounds(work: TrainingWork, step: Callable[[Batch], float], imported_mib: float) -> Callable[[], _Memory]:
    batch = work.batch()
    set_up_mib = _resident_mib()
    found: list[_Memory] = []

    def run() -> _Memory:
        if found:
            step(batch)
        else:  # the warm-up
            with TensorMemory() as memory:
                step(batch)
            found.append(_Memory(imported_mib, set_up_mib, memory.peak_bytes / 2**20))
        return found[0]

    return run


def _agreement(work: TrainingWork) -> dict[str, float]:
    """Loss and gradients of the same step both ways, without dropout."""
    work = replace(work, dropout=0.0)
    model, batch = work.adapted_model(), work.batch()
    counts = normalizer(batch)
    plain = PlainTraining(model, tokenizer(), criterion(work), bf16=work.bf16)
    expected = float(plain.backward(batch, counts))
    expected_gradients = gradients(model)
    model.zero_grad(set_to_none=True)
    loss = float(make_runner(work, model, OurSettings(same_loss=True)).backward(batch, counts)[0])
    similarity = torch.cosine_similarity(gradients(model).double(), expected_gradients.double(), dim=0)
    return {
        f"loss, {SAME_LOSS}": loss,
        f"loss, {PLAIN}": expected,
        "cosine of both gradients": round(float(similarity), 8),
    }


def _beyond(measured: Measured, stage: Literal["imported_mib", "set_up_mib"]) -> float | None:
    """Peak beyond what the process held at that stage, in MiB."""
    return None if measured.peak_mib is None else round(measured.peak_mib - getattr(measured.results[0], stage))


def _shares(found: Mapping[str, Measured], stage: Literal["imported_mib", "set_up_mib"]) -> dict[str, float | None]:
    plain = _beyond(found[PLAIN], stage)
    beyond = {name: _beyond(measured, stage) for name, measured in found.items()}
    return {name: round(mib / plain, 3) if mib is not None and plain else None for name, mib in beyond.items()}


def _resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20
