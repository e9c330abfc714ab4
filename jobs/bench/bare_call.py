"""The cost of a request without HTTP and Ray: the engine's own calls, in a process that does nothing else."""

from __future__ import annotations

import hashlib
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from jobs.bench.load import with_new_bytes
from jobs.bench.serving_work import PictureQuestion


def time_bare_calls(model: str, adapter: Path, question: PictureQuestion, *, seconds: float) -> tuple[float, float]:
    """Median milliseconds of a question about an image that is kept, and about a new one: decoding, answer, masks.

    Args:
        model: "tiny" or a folder.
        adapter: An adapter folder.
        question: What is asked.
        seconds: To measure each of both.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, model, adapter, question, seconds).result()


def _measure(model: str, adapter: Path, question: PictureQuestion, seconds: float) -> tuple[float, float]:
    from sam3lora.config.post_processing import PostProcessing
    from sam3lora.engine.engine import Engine, PromptedImage

    engine = Engine.load(model, local_files_only=True)
    engine.place_adapter(0, engine.read_adapter(adapter))
    engine.warm_up()
    picture = question.picture
    post = PostProcessing(threshold=question.threshold, nms="none")

    def ask(jpeg: bytes) -> None:
        key = hashlib.sha256(jpeg).hexdigest()
        image = engine.cached_image(key) or engine.prepare_image(jpeg, key)
        engine.detect([PromptedImage(image, (picture.prompt,), slot=0, post=post)])

    def median_ms(all_different: bool) -> float:
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            jpeg = with_new_bytes(picture.jpeg) if all_different else picture.jpeg
            start = time.perf_counter()
            ask(jpeg)
            found.append(time.perf_counter() - start)
        return statistics.median(found) * 1000

    ask(picture.jpeg)
    return median_ms(all_different=False), median_ms(all_different=True)
