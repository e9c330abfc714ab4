"""Kernels that an inference and a training step start, counted part by part without a GPU.

On a GPU a step cannot be faster than the host starts its kernels (5 to 35 us each). The counts depend on the number of
layers and not on their width, so they come from a narrow model with the layers of `facebook/sam3`, which runs whole on
a pretended GPU: the engine with its selection of detections, and a training step with matching, clipping and AdamW.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console

from jobs.bench.models import random_model
from jobs.bench.our_training import OurSettings, make_runner, our_step
from jobs.bench.pretend_gpu import DEVICE, Launches, pretend_gpu
from jobs.bench.recorded_graphs import RecordingCapturer
from jobs.bench.training_work import PIXEL_MEAN_STD, TrainingWork, tokenizer
from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.losses.masks import mask_loss_sums
from sam3lora.model.loading import LoadedBase
from sam3lora.model.staged.forward import StagedSam3

MODEL = "narrow"
PARTS = {
    "encode_images": "vision",
    "encode_trunk": "vision",
    "encode_rest": "vision",
    "encode_text": "text",
    "prepare": "detector",
    "begin_fusion": "detector",
    "detect": "detector",
    "detect_prompted": "detector",
    "mask_head": "masks",
}
"""Part that each method of `StagedSam3` is counted under."""
PRESETS, PROMPTS = ("light", "balanced", "full", "maximum"), (1, 8, 32)
PART_NAMES = ("vision", "text", "detector", "masks", "loss", "backward", "AdamW", "other")


@dataclass
class Count:
    """Launches of one piece of work.

    Attributes:
        work: What was done.
        launches: Kernels and copies, a captured graph as one.
        by_part: The same by part: `PART_NAMES`.
        reads: How often the host waited for the device.
    """

    work: str
    launches: int
    by_part: dict[str, int]
    reads: int


@dataclass(frozen=True)
class LaunchReport:
    """Counts, and the bytes that the mask loss moves; None if they were not asked for."""

    counts: Sequence[Count]
    loss_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        counts = [asdict(count) for count in self.counts]
        return {"title": "launches", "counts": counts, "loss_bytes": self.loss_bytes, "torch": torch.__version__}

    def print(self, console: Console) -> None:
        widths = [max(len(name), 5) for name in PART_NAMES]
        work_width = max(len(count.work) for count in self.counts)
        heads = [f"{name:>{width}}" for name, width in zip(PART_NAMES, widths, strict=True)]
        console.print(" ".join([f"{'work':{work_width}}", "  all", "reads", *heads]), soft_wrap=True)
        for count in self.counts:
            parts = [f"{count.by_part.get(n, 0):>{w}}" for n, w in zip(PART_NAMES, widths, strict=True)]
            line = [f"{count.work:{work_width}}", f"{count.launches:5}", f"{count.reads:5}", *parts]
            console.print(" ".join(line), highlight=False, soft_wrap=True)
        if self.loss_bytes is not None:
            gigabytes = self.loss_bytes / 1e9
            console.print(f"mask loss of 80 masks at 1008 x 1008: {gigabytes:.1f} GB moved", highlight=False)


def count_launches(presets: Sequence[str] = PRESETS, prompts: Sequence[int] = PROMPTS) -> LaunchReport:
    """Inference with so many prompts, a step of each preset, and the bytes of the mask loss (some 10 GB of memory)."""
    counts = [
        count for graphs in (False, True) for number in prompts for count in count_inference(number, graphs=graphs)
    ]
    counts += [count_training_step(preset, graphs=graphs) for graphs in (False, True) for preset in presets]
    return LaunchReport(counts, count_loss_bytes())


def count_inference(
    num_prompts: int, *, model: str = MODEL, graphs: bool = False, **engine_options: Any
) -> list[Count]:
    """A first question with this many prompts on one image, and the same question again, through `Engine`.

    With `graphs`, its stages are captured before, as they are after an engine's warm-up.
    """
    with pretend_gpu() as launches:
        engine_options = {"max_rows": 32, "capturer": _capturer(launches) if graphs else None} | engine_options
        engine = Engine(_base(model), precision="bfloat16", cuda_graphs=graphs, **engine_options)
        pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)

        def ask(key: str) -> None:
            image = engine.cached_image(key) or engine.prepare_image(pixels, key)
            prompts = tuple(f"{key} {number}" for number in range(num_prompts))
            engine.detect_small([PromptedImage(image, prompts, post=PostProcessing(threshold=0.0, max_detections=10))])

        for key in ("before", "captured") if graphs else ("before",):  # what is made once
            ask(key)
        how = ", graphs" if graphs else ""
        with _parts_of_stages(launches):
            return [
                _counted(launches, f"{num_prompts} prompts, {way}{how}", lambda: ask("asked"))
                for way in ("first", "again")
            ]


def count_training_step(
    preset: str,
    *,
    num_prompts: int = 4,
    model: str = MODEL,
    max_prompts: int | None = None,
    graphs: bool = False,
) -> Count:
    """A step of a preset on one image: gradients, clipping and AdamW, as the trainer does them.

    With `graphs`, its stages are captured before, as they are after two steps.
    """
    with pretend_gpu() as launches:
        work = TrainingWork(preset, model, num_prompts=num_prompts, precision="bf16", geometry_cls=True, device="cuda")
        adapted = work.adapted_model()
        settings = OurSettings(max_prompts=max_prompts)
        runner = make_runner(work, adapted, settings, capturer=_capturer(launches) if graphs else None)
        step = our_step(work, adapted, runner)
        batch = work.batch()
        for _ in range(3 if graphs else 1):  # what is made once
            step(batch)
        runner.criterion = _LossInParts(runner.criterion, launches)  # type: ignore[assignment]
        with _parts_of_stages(launches):
            how = ", graphs" if graphs else ""
            return _counted(launches, f"step of {preset}{how}", lambda: step(batch))


def count_loss_bytes(num_masks: int = 80, *, side: int = 1008) -> int:
    """Bytes that the kernels of the mask loss read and write, forward and backward, for masks of `side` pixels."""
    with pretend_gpu() as launches:
        generator = torch.Generator().manual_seed(0)
        small = side * 2 // 7  # 4 x 4 to a patch of 14 x 14
        logits = torch.randn(num_masks, small, small, generator=generator).to(DEVICE).requires_grad_(True)
        masks = (torch.rand(num_masks, side, side, generator=generator) > 0.5).to(DEVICE)
        index = torch.arange(num_masks).to(DEVICE)
        launches.clear()
        focal, dice = mask_loss_sums(logits, masks, index)
        (focal + dice).backward()
        return launches.bytes_by_part.total()


def _base(model: str) -> LoadedBase:
    sam3 = random_model(model, device=DEVICE)
    side: int = sam3.config.image_size  # type: ignore[assignment]
    return LoadedBase(sam3, tokenizer(), model, None, "", side, *PIXEL_MEAN_STD)


def _counted(launches: Launches, work: str, run: Callable[[], object]) -> Count:
    launches.clear()
    run()
    reads, parts = launches.reads.total(), dict(launches.by_part)
    return Count(work, launches.total, parts, reads)


def _capturer(launches: Launches) -> RecordingCapturer:
    return RecordingCapturer(capturing=lambda: _without_transfers(launches), replaying=lambda: launches.as_one("graph"))


@contextmanager
def _without_transfers(launches: Launches) -> Iterator[None]:
    """A capture may copy nothing between host and device."""
    before = Counter(launches.by_operator)
    yield
    copies = {name for name in launches.by_operator - before if name.startswith("copy_to_")}
    assert not copies, f"a capture cannot do {copies}"


@contextmanager
def _parts_of_stages(launches: Launches) -> Iterator[None]:
    places: list[tuple[Any, str, str]] = [(StagedSam3, name, part) for name, part in PARTS.items()]
    places += [(torch.autograd, "backward", "backward"), (torch.optim.AdamW, "step", "AdamW")]

    def counted(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with launches.part(part):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for place, name, part in places:
            stack.enter_context(mock.patch.object(place, name, counted(getattr(place, name), part)))
        yield


class _LossInParts:
    """A criterion whose kernels are counted under "loss"."""

    def __init__(self, criterion: Any, launches: Launches) -> None:
        self._criterion, self._launches = criterion, launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._criterion, name)

    def begin(self, *args: Any) -> Any:
        with self._launches.part("loss"):
            return self._criterion.begin(*args)

    def __call__(self, *args: Any) -> Any:
        with self._launches.part("loss"):
            return self._criterion(*args)
