"""The engine of serving, `Predictor` and evaluation on a GPU, with and without CUDA graphs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs.bench.gpu_cases import GpuCase
from jobs.bench.gpu_timing import Row, forget_peak, median_ms, peak_gb, time_left_s
from jobs.bench.models import random_model

if TYPE_CHECKING:
    from sam3lora.engine.engine import Engine

MOST_ROWS = 32


def engine_cases(model_name: str, device: torch.device, *, prompts: Sequence[int], repeats: int) -> Iterator[GpuCase]:
    """Milliseconds of a call about a new image with new prompts, and about known ones; a warm-up belongs to the first.

    From pixels to the mask logits of ten detections a prompt, on the host.
    """
    for graphs in ("on", "off"):
        engine = cache(partial(_warm_engine, model_name, device, graphs))
        for number in prompts:
            key = {"graphs": graphs, "prompts": number}
            yield GpuCase(key, partial(_timed, engine, number, device, repeats))
        engine.cache_clear()


def _warm_engine(model_name: str, device: torch.device, graphs: str) -> tuple[Engine, float]:
    """The engine, and the seconds of its warm-up."""
    from transformers import AutoTokenizer

    from sam3lora.engine.engine import Engine
    from sam3lora.model.loading import LoadedBase
    from sam3lora.model.tiny import TINY_FOLDER

    model: Any = random_model(model_name, device=device)
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER, local_files_only=True)
    half = (0.5, 0.5, 0.5)
    base = LoadedBase(model, tokenizer, model_name, None, "", model.config.image_size, half, half)
    engine = Engine(base, precision="bfloat16", max_rows=MOST_ROWS, cuda_graphs=graphs == "on")
    start = time.perf_counter()
    engine.warm_up()
    return engine, time.perf_counter() - start


def _timed(engine_of: Callable[[], tuple[Engine, float]], num_prompts: int, device: torch.device, repeats: int) -> Row:
    from sam3lora.config.post_processing import PostProcessing
    from sam3lora.engine.engine import PromptedImage

    engine, warm_up_s = engine_of()
    time_left_s()
    side, names = engine.resolution, itertools.count()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    post = PostProcessing(threshold=0.0, nms="none", max_detections=10)

    def ask(key: str) -> None:
        image = engine.cached_image(key) or engine.prepare_image(pixels, key)
        prompts = tuple(f"{key} {number}" for number in range(num_prompts))
        engine.detect_small([PromptedImage(image, prompts, post=post)])

    forget_peak(device)
    clock = torch.device("cpu")  # the answer is on the host
    first = median_ms(lambda: ask(f"{num_prompts} {next(names)}"), clock, repeats=repeats, warm_ups=2)
    again = median_ms(lambda: ask("known"), clock, repeats=repeats, warm_ups=2)
    return {
        "first call ms": first,
        "again ms": again,
        "again / first": again / first,
        "peak GB": peak_gb(device),
        "warm-up s": warm_up_s,
    }
