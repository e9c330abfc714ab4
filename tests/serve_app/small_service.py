"""A small random base, adapters over it, requests with their right answers, and settings for two CPU cores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import Detections
from sam3lora.engine.selection import Wanted

from ..engine.engine_cases import PeftReference, write_adapter, write_base
from .checked_load import Case
from .http_cases import picture

ADAPTERS = {"towers": "vision", "heads": "no cls", "words": "text"}
PROMPTS = ("crack", "hole")
POST = PostProcessing(threshold=0.0, max_detections=2)
IMAGES = tuple(picture((64, 64), seed=seed) for seed in range(4))


class SmallService:
    """Files under `folder`: the base, unless there is one already, and a root of adapters."""

    def __init__(self, folder: Path, *, base: Path | None = None, first_seed: int = 0) -> None:
        self.base = base or write_base(folder / "sam3")
        self.root = folder / "adapters"
        for seed, (name, kind) in enumerate(ADAPTERS.items(), start=first_seed):
            self.add_adapter(name, kind, seed)

    def add_adapter(self, name: str, kind: str, seed: int) -> None:
        """Write an adapter into the root, or replace it."""
        write_adapter(self.root / name, self.base, kind, seed)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Fields of `ServeSettings`, ready for JSON."""
        values = {
            "model": str(self.base),
            "adapters": {"root": str(self.root)},
            "num_cpus": 0.5,
            "num_gpus": 0,
            "torch_threads": 1,
        }
        return json.loads(json.dumps(values | changes))

    def answers(self, adapters: Sequence[str | None], images: Sequence[bytes] = IMAGES) -> list[list[list[Detections]]]:
        """One by one through PEFT: for each adapter, for each image, what is found for each prompt."""
        found = {name: self.root / name for name in {*ADAPTERS, *adapters} if name is not None}
        peft = PeftReference(found, self.base)
        pixels = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data in images]
        return [
            [
                [peft.detect(image, name, Wanted(prompt, image.shape[:2], POST)) for prompt in PROMPTS]
                for image in pixels
            ]
            for name in adapters
        ]

    def cases(self, adapters: Sequence[str | None] = (None, *ADAPTERS)) -> list[Case]:
        """Every image with every adapter; no two have the same answer."""
        known = dict(zip(adapters, self.answers(adapters), strict=True))
        return [
            Case(IMAGES[number], fields(name), (known[name][number],))
            for number in range(len(IMAGES))
            for name in adapters
        ]


def fields(adapter: str | None, **changes: Any) -> dict[str, Any]:
    """The `request` of the form."""
    asked: Mapping[str, Any] = {"threshold": POST.threshold, "max_detections": POST.max_detections}
    return {"prompts": PROMPTS, "adapter": adapter, **asked, **changes}
