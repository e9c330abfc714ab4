"""Requests over several adapters: one batch that mixes them, against `set_adapter` and a forward for each request."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from jobs.bench.processes import Measured, Round, Work, measure_in_turns
from jobs.bench.prompts import KEPT, SIZE_HW
from jobs.bench.report import BenchReport, Timing
from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.synth.scenes import draw_scene
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.features import to_pixel_values
from sam3lora.errors import UserError
from sam3lora.model.adapter.lora_layers import LoraSettings
from sam3lora.model.base_folder import find_base

RANK = 16
NUM_ADAPTERS = 4
DETECTOR = ("detr_encoder", "detr_decoder", "mask_decoder")
KINDS: dict[str, tuple[str, ...]] = {"detector": DETECTOR, "vision": ("vision_encoder", *DETECTOR)}
"""What the adapters change."""


@dataclass(frozen=True)
class Requests:
    """A prompt for an image under an adapter each: adapters and images in turns.

    Attributes:
        model: "tiny" or a folder.
        adapters: Folders.
        num_requests: Asked together.
        num_images: Different ones among them.
        kept: Whether the features of the images are known from an earlier question.
        thresholds: Of each request; none keeps everything.
    """

    model: str
    adapters: tuple[Path, ...]
    num_requests: int = 8
    num_images: int = 8
    kept: bool = False
    thresholds: tuple[float, ...] = ()

    def prompt(self, number: int) -> str:
        return f"thing number {number}"

    def pixels(self, number: int, side: int) -> np.ndarray:
        """The request's image at the size of the model's input, so that neither way resizes it."""
        return draw_scene(np.random.default_rng(number % self.num_images), size=side).image_HW3

    def adapter(self, number: int) -> int:
        """Each adapter sees different images."""
        return number // max(1, self.num_requests // len(self.adapters)) % len(self.adapters)


Found = list[list[float]]
"""Scores of the kept detections of each request, descending."""


def compare_adapters(
    model_name: Literal["tiny", "small"] = "small",
    *,
    num_requests: int = 8,
    repeats: int = 3,
    every_case: bool = True,
) -> list[BenchReport]:
    """Time `num_requests` requests over four adapters of rank 16, from the model's input to the kept detections.

    Ours answers them in one batch and goes on to run-length codes; the plain way is stock transformers and PEFT:
    `set_adapter`, a forward of the model and `post_process_instance_segmentation` for each request. Ours is measured
    with one adapter for all requests too: the ratio of both is what mixing costs. The prompts' text features are known
    to ours, as a service knows them. Cases: each request has an image of its own that was never seen; all are about one
    image that was never seen; about one image that is known; and an image each with adapters that change the vision
    tower. (One image under four of the last takes four vision passes whatever one does.)

    Args:
        model_name: A configuration, with random weights.
        num_requests: Asked together.
        repeats: Rounds; the median counts.
        every_case: All cases; else an image each under adapters of the detector, and one image that is known.

    Raises:
        UserError: Fewer requests than adapters.
    """
    if num_requests < NUM_ADAPTERS:
        raise UserError(f"requests must be at least {NUM_ADAPTERS}, one for each adapter, got {num_requests}")
    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as folder:
        model, adapters = _write(Path(folder), model_name)
        every_image = Requests(model, adapters["detector"], num_requests, num_images=num_requests)
        one_image = replace(every_image, num_images=1)
        known_image = replace(one_image, kept=True)
        vision = replace(every_image, adapters=adapters["vision"])
        cases = {
            "an image each, adapters of the detector": every_image,
            "one image that is known, adapters of the detector": known_image,
        }
        if every_case:
            cases["one image, adapters of the detector"] = one_image
            cases["an image each, adapters of vision and detector"] = vision
        return [
            _compare(f"{num_requests} requests, {title}, {model_name} with random weights", requests, repeats)
            for title, requests in cases.items()
        ]


def _write(folder: Path, model_name: str) -> tuple[str, dict[str, tuple[Path, ...]]]:
    from jobs.bench.serving_work import write_adapter, write_random
    from sam3lora.model.loading import load_base

    disable_progress_bar()
    model = "tiny" if model_name == "tiny" else str(write_random(folder / "model", "small"))
    base = load_base(model, local_files_only=True)
    adapters = {
        kind: tuple(
            write_adapter(
                base,
                folder / kind / f"adapter_{seed}",
                LoraSettings(rank=RANK, alpha=2 * RANK, components=components),
                seed=seed,
            )
            for seed in range(NUM_ADAPTERS)
        )
        for kind, components in KINDS.items()
    }
    return model, adapters


def _compare(title: str, requests: Requests, repeats: int) -> BenchReport:
    mixed = replace(requests, thresholds=_thresholds(requests))
    alone = replace(requests, adapters=requests.adapters[:1])
    names = (
        f"sam3lora, {NUM_ADAPTERS} adapters",
        "sam3lora, 1 adapter",
        f"transformers and PEFT, {NUM_ADAPTERS} adapters",
    )
    single = replace(alone, thresholds=_thresholds(alone))
    ways = dict(
        zip(
            names,
            (
                Work(make_mixed, {"requests": mixed}),
                Work(make_mixed, {"requests": single}),
                Work(make_plain, {"requests": mixed}),
            ),
            strict=True,
        )
    )
    found = measure_in_turns(ways, rounds=repeats, warm_ups=0)
    return BenchReport(
        title,
        [Timing(name, measured.median, measured.extra_mib) for name, measured in found.items()],
        {
            "adapters": f"rank {RANK}",
            **_agreement(found[names[0]], found[names[2]]),
        },
    )


def _thresholds(requests: Requests) -> tuple[float, ...]:
    """Random weights score everything alike: what a tenth of each request's object queries reaches."""
    everything = make_mixed(replace(requests, thresholds=()))()
    found = []
    for scores in everything:
        num_kept = max(1, round(KEPT * len(scores)))
        found.append(float(np.mean(scores[num_kept - 1 : num_kept + 1])))  # where rounding decides nothing
    return tuple(found)


def make_mixed(requests: Requests) -> Round:
    """All requests in one batch of the engine."""
    from sam3lora.engine.engine import Engine, PromptedImage

    engine = Engine.load(
        requests.model, num_slots=len(requests.adapters), max_rows=requests.num_requests, local_files_only=True
    )
    for slot, adapter in enumerate(requests.adapters):
        engine.place_adapter(slot, engine.read_adapter(adapter))
    # None keeps every object query, with no masks: what thresholds are chosen from.
    posts = [PostProcessing(threshold=threshold, nms="none") for threshold in requests.thresholds]
    everything = PostProcessing(threshold=0.0, nms="none", max_detections=10_000)
    questions = [
        PromptedImage(
            PreparedImage(f"image {number % requests.num_images}", requests.pixels(number, engine.resolution), SIZE_HW),
            (requests.prompt(number),),
            slot=requests.adapter(number),
            post=posts[number] if posts else everything,
            masks=bool(posts),
        )
        for number in range(requests.num_requests)
    ]
    engine.detect_small(questions[:1])

    def answer() -> Found:
        if not requests.kept:
            engine.drop_features()
        answers = engine.detect_small(questions)
        found = []
        for one in answers:
            if isinstance(one, Exception):
                raise one
            for small in one:
                small.at_full_size()
                found.append(small.scores_N.tolist())  # with those whose mask is empty, as the plain way has them
        return found

    if requests.kept:
        answer()
    return answer


def make_plain(requests: Requests) -> Round:
    """Stock model and PEFT, a request after the other."""
    from jobs.bench.plain_server import PlainSegmenter

    plain = PlainSegmenter(find_base(requests.model).path, requests.adapters[0].parent)
    names = [folder.name for folder in requests.adapters]
    processor = plain.processor
    side = plain.model.config.image_size
    inputs = [
        processor(text=requests.prompt(number), images=requests.pixels(number, side), return_tensors="pt")
        for number in range(requests.num_requests)
    ]
    for number, given in enumerate(inputs):
        given["pixel_values"] = to_pixel_values([requests.pixels(number, side)], side)

    @torch.inference_mode()
    def answer(numbers: Sequence[int] = range(requests.num_requests)) -> Found:
        found = []
        for number in numbers:
            plain.model.set_adapter(names[requests.adapter(number)])
            output = plain.model(**inputs[number])
            (kept,) = processor.post_process_instance_segmentation(
                output, threshold=requests.thresholds[number], target_sizes=[SIZE_HW]
            )
            found.append(sorted(kept["scores"].tolist(), reverse=True))
        return found

    answer([0])
    return answer


def _agreement(ours: Measured, plain: Measured) -> dict[str, Any]:
    """Whether a batch of all gives the detections that the requests have one by one."""
    together, alone = ours.results[-1], plain.results[-1]
    same = sum(len(first) == len(second) for first, second in zip(together, alone, strict=True))
    differences = [
        abs(one - other)
        for first, second in zip(together, alone, strict=True)
        if len(first) == len(second)
        for one, other in zip(first, second, strict=True)
    ]
    return {
        "detections, sam3lora": sum(map(len, together)),
        "detections, transformers and PEFT": sum(map(len, alone)),
        "requests with equally many": f"{same} of {len(alone)}",
        "largest difference of scores": float(f"{max(differences):.1e}") if differences else None,
    }
