"""Inference of SAM 3 on one image, stage by stage: eager, compiled, and asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Sam3Model

from jobs.bench.gpu_cases import GpuCase
from jobs.bench.gpu_timing import Row, Stopwatch, forget_peak, median_ms, medians, peak_gb
from jobs.bench.models import random_model
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures

KEPT = 30
"""Object queries whose masks are made."""

SIZE_HW = (1500, 2000)
"""Of the image that masks are brought back to."""


@dataclass
class Inference:
    """One image and its prompts, asked under bfloat16 autocast; random weights, pixels and token ids.

    Attributes:
        encode: The vision encoder, or a compiled one.
    """

    staged: StagedSam3
    pixels_1CHW: Tensor
    ids_PT: Tensor
    encode: Callable[[Tensor], VisionFeatures]

    @classmethod
    def of(cls, model: Sam3Model, num_prompts: int, device: torch.device) -> Inference:
        config = cast(Any, model.config)
        torch.manual_seed(0)
        staged = StagedSam3(model)
        ids_PT = torch.randint(3, config.text_config.vocab_size, (num_prompts, 32), device=device)
        pixels = torch.rand(1, 3, config.image_size, config.image_size, device=device) * 2 - 1
        return cls(staged, pixels, ids_PT, staged.encode_images)

    @torch.no_grad()
    def first_call(self, watch: Stopwatch) -> VisionFeatures:
        """From pixels to mask logits."""
        with watch.part("vision"), self._autocast():
            vision = self.staged.prepare(self.encode(self.pixels_1CHW))
        self.answer(vision, self.encode_text(watch), watch)
        return vision

    def encode_text(self, watch: Stopwatch) -> TextFeatures:
        with torch.no_grad(), watch.part("text"), self._autocast():
            return self.staged.encode_text(self.ids_PT, torch.ones_like(self.ids_PT))

    @torch.no_grad()
    def answer(self, vision: VisionFeatures, text: TextFeatures, watch: Stopwatch) -> None:
        """What is left for an image and prompts that were seen before: detector and masks."""
        num_prompts = len(self.ids_PT)
        device = self.pixels_1CHW.device
        with watch.part("detector"), self._autocast():
            rows = torch.arange(num_prompts, device=device)
            found = self.staged.detect(vision, text, torch.zeros_like(rows), rows)
        best_BK = found.scores_BQ().topk(min(KEPT, found.logits_LBQ.shape[-1])).indices.cpu()
        with watch.part("masks"), self._autocast():
            head = self.staged.mask_head(found, torch.arange(num_prompts))
            query_M = torch.arange(num_prompts).repeat_interleave(best_BK.shape[1])
            head.instance_logits(query_M, best_BK.flatten())

    def post_processing_ms(self, repeats: int) -> Row:
        """Of all prompts, on the host: `KEPT` drawn masks of each, since masks of random weights are noise."""
        drawn_KHW = _draw_masks(self.staged.model.config)
        if drawn_KHW is None:
            return {"note": "post-processing needs pycocotools"}
        drawn = [drawn_KHW] * len(self.ids_PT)
        cpu = torch.device("cpu")
        return {"post-processing ms": median_ms(lambda: _post_process(drawn), cpu, repeats=repeats, warm_ups=1)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.pixels_1CHW.device.type, dtype=torch.bfloat16)


def inference_cases(
    model_name: str, device: torch.device, *, prompts: Sequence[int], repeats: int
) -> Iterator[GpuCase]:
    """A row for each number of prompts.

    Milliseconds of a first call and of a call about an image and prompts that are known, both without post-processing;
    of the stages of a first call; and of post-processing on the host.
    """
    model = cache(partial(base_model, model_name, device))
    for number in prompts:
        yield GpuCase({"way": "eager", "prompts": number}, partial(_timed, model, number, device, repeats))


def compiled_cases(model_name: str, device: torch.device, *, repeats: int) -> Iterator[GpuCase]:
    """The same with the vision encoder compiled, which takes a minute at first and cannot be cut."""
    compiled = {"way": "vision compiled", "prompts": 1}
    if device.type == "cuda":
        model = cache(partial(base_model, model_name, device))
        yield GpuCase(compiled, partial(_timed, model, 1, device, repeats, compile_vision=True))
    else:
        yield GpuCase(compiled, lambda: {"note": "needs a GPU"})


def _timed(
    model_of: Callable[[], Sam3Model],
    num_prompts: int,
    device: torch.device,
    repeats: int,
    *,
    compile_vision: bool = False,
) -> Row:
    asked, watch = Inference.of(model_of(), num_prompts, device), Stopwatch(device)
    if compile_vision:
        asked.encode = _compiled(asked.staged.model)
    forget_peak(device)
    for _ in range(2):
        asked.first_call(watch)
    watch.milliseconds()
    rounds = []
    for _ in range(repeats):
        vision = asked.first_call(watch)
        rounds.append(watch.milliseconds())
    text = asked.encode_text(watch)
    watch.milliseconds()
    first = median_ms(lambda: asked.first_call(Stopwatch(device)), device, repeats=repeats, warm_ups=0)
    again = median_ms(lambda: asked.answer(vision, text, Stopwatch(device)), device, repeats=repeats, warm_ups=1)
    return {
        "first call ms": first,
        "again ms": again,
        "again / first": again / first,
        **{f"{name} ms": taken for name, taken in medians(rounds).items()},
        **asked.post_processing_ms(repeats=min(repeats, 3)),
        "peak GB": peak_gb(device),
    }


def base_model(model_name: str, device: torch.device) -> Sam3Model:
    model = random_model(model_name, device=device)
    store_matrices_in(model, torch.bfloat16, text_tower=True)
    return model


def _compiled(model: Sam3Model) -> Callable[[Tensor], VisionFeatures]:
    compiled = torch.compile(model.vision_encoder)
    return lambda pixels_ICHW: VisionFeatures.from_output(compiled(pixels_ICHW))


def _draw_masks(config: Any) -> Tensor | None:
    """Logits of `KEPT` discs in the size of the model's masks; None without the packages that encode masks."""
    try:
        from jobs.bench.postprocess import Workload
    except ImportError:
        return None
    return Workload("blobs", num_masks=KEPT, mask_side=config.image_size // 14 * 4).draw()[1]


def _post_process(drawn: Sequence[Tensor]) -> None:
    """Suppression and run-length codes of the masks (K, h, w) of each prompt."""
    from sam3lora.config.post_processing import PostProcessing
    from sam3lora.engine.mask_codes import encode_logits
    from sam3lora.engine.postprocess import select

    post = PostProcessing(threshold=0.0, nms="box", nms_iou=1.0)
    for logits_KHW in drawn:
        scores_K, boxes_K4 = torch.linspace(0.9, 0.5, len(logits_KHW)), torch.full((len(logits_KHW), 4), 0.5)
        kept = select(scores_K, boxes_K4, logits_KHW, post)
        assert kept.mask_logits_NHW is not None
        for mask in kept.mask_logits_NHW.numpy():
            encode_logits(mask, SIZE_HW)
