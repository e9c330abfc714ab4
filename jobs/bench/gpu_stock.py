"""Inference as users of stock transformers write it, beside the rows of `gpu_inference`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Sam3Model

from jobs.bench.gpu_cases import GpuCase
from jobs.bench.gpu_timing import Row, forget_peak, median_ms, peak_gb
from jobs.bench.models import random_model


@dataclass(frozen=True)
class StockInference:
    """One image and its prompts, a forward of the stock model for each; random weights, pixels and token ids."""

    model: Sam3Model
    pixels_1CHW: Tensor
    ids_PT: Tensor

    @classmethod
    def of(cls, model: Sam3Model, num_prompts: int, device: torch.device) -> StockInference:
        config = cast(Any, model.config)
        torch.manual_seed(0)
        ids_PT = torch.randint(3, config.text_config.vocab_size, (num_prompts, 32), device=device)
        pixels = torch.rand(1, 3, config.image_size, config.image_size, device=device) * 2 - 1
        return cls(model, pixels.to(model.dtype), ids_PT)

    @torch.no_grad()
    def ask(self, vision: Any = None) -> None:
        """Every prompt, with the whole image each time, or with what the vision encoder returned for it."""
        image = {"pixel_values": self.pixels_1CHW} if vision is None else {"vision_embeds": vision}
        for ids_T in self.ids_PT:
            self.model(**image, input_ids=ids_T[None], attention_mask=torch.ones_like(ids_T[None]))

    @torch.no_grad()
    def encode(self) -> Any:
        return self.model.vision_encoder(self.pixels_1CHW)


def stock_cases(model_name: str, device: torch.device, *, prompts: Sequence[int], repeats: int) -> Iterator[GpuCase]:
    """Milliseconds of a first call and of one about the same image, from pixels to mask logits, in two precisions.

    In bfloat16 also for a user who keeps `vision_embeds`.
    """
    for words, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model = cache(partial(_model, model_name, device, dtype))
        for number in prompts:
            for keeps in (False, True) if dtype == torch.bfloat16 else (False,):
                way = f"transformers, {words}{', vision_embeds kept' if keeps else ''}"
                yield GpuCase({"way": way, "prompts": number}, partial(_timed, model, number, keeps, device, repeats))
        model.cache_clear()


def _model(model_name: str, device: torch.device, dtype: torch.dtype) -> Sam3Model:
    return cast(Sam3Model, random_model(model_name, device=device).to(dtype))  # type: ignore[arg-type]


def _timed(model_of: Callable[[], Sam3Model], num_prompts: int, keeps: bool, device: torch.device, repeats: int) -> Row:
    asked = StockInference.of(model_of(), num_prompts, device)
    forget_peak(device)
    first = median_ms(lambda: asked.ask(asked.encode() if keeps else None), device, repeats=repeats, warm_ups=1)
    row: Row = {"first call ms": first}
    if keeps:
        vision = asked.encode()
        again = median_ms(lambda: asked.ask(vision), device, repeats=repeats, warm_ups=0)
        row |= {"again ms": again, "again / first": again / first}
    return row | {"peak GB": peak_gb(device)}
