"""The work of the serving benchmark: a model, adapters of several kinds, pictures and thresholds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlencode

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Sam3ImageProcessor, Sam3Processor
from transformers.utils.logging import disable_progress_bar

from jobs.bench.load import LoadRequest, with_new_bytes
from jobs.bench.models import FULL_SIZE, random_model
from jobs.bench.prompts import KEPT
from sam3lora.data.synth.scenes import draw_scene
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import AdapterMetadata, save_adapter
from sam3lora.model.adapter.lora_layers import LoraSettings, apply_lora
from sam3lora.model.base_folder import find_base
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.tiny import TINY_FOLDER

Images = Literal["same", "pool", "different"]
SIZE_HW = (480, 640)
MIN_JPEG_BYTES = 40_000
RANK = 8
_DETECTOR = ("detr_encoder", "detr_decoder")
_KINDS: tuple[tuple[str, ...], ...] = (
    _DETECTOR,
    (*_DETECTOR, "mask_decoder"),
    ("detr_decoder",),
    ("vision_encoder", *_DETECTOR),
    _DETECTOR,
    (*_DETECTOR, "mask_decoder"),
    ("detr_decoder",),
    _DETECTOR,
)
"""Components of the adapters in turn: one in eight changes the vision tower, so that it needs features of its own."""


@dataclass(frozen=True)
class ServingPlan:
    """What is measured.

    Args:
        model: "tiny", or "small": random weights in real proportions.
        clients: Numbers of clients in the closed loop.
        adapters: Numbers of adapters they ask for in turns.
        seconds: Of each measurement.
        images: Of the closed loop: always the same, a pool that all share, or a new one with every request.
        repeated: Also measure what a repeated image costs on the small model.
        haproxy: Start `sam3lora serve` with `--haproxy`.

    Raises:
        UserError: A number that is not positive.
    """

    model: Literal["tiny", "small"] = "tiny"
    clients: Sequence[int] = (1, 8, 32)
    adapters: Sequence[int] = (1, 4, 16)
    seconds: float = 5.0
    images: Images = "pool"
    repeated: bool = True
    haproxy: bool = False

    def __post_init__(self) -> None:
        for name in ("clients", "adapters"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"{name} must be positive numbers, got {list(values)}")
        if self.seconds <= 0:
            raise UserError(f"seconds must be positive, got {self.seconds}")


@dataclass(frozen=True)
class Picture:
    """A JPEG of 640 x 480 and a prompt for it."""

    jpeg: bytes = field(repr=False)
    prompt: str


@dataclass(frozen=True)
class PictureQuestion:
    """One prompt about one picture; about a tenth of the adapter's object queries reach the threshold."""

    picture: Picture
    adapter: str
    threshold: float

    def request(self, *, as_new: bool = False) -> LoadRequest:
        """No suppression of overlaps (transformers has none); masks as run-length codes.

        Args:
            as_new: Give the picture bytes that were never sent before.
        """
        query = {
            "prompts": self.picture.prompt,
            "adapter": self.adapter,
            "threshold": self.threshold,
            "nms_iou": 1.0,
            "masks": "rle",
        }
        jpeg = self.picture.jpeg
        return LoadRequest(f"/v1/segment?{urlencode(query)}", with_new_bytes(jpeg) if as_new else jpeg)


@dataclass(frozen=True)
class ServingWork:
    """What the servers are started with, and what they are asked.

    Attributes:
        model: "tiny" or the folder of the small model.
        adapters: The folder of adapter folders.
        questions: Of each adapter, about the pictures of the pool in their order.
    """

    model: str
    adapters: Path
    questions: dict[str, list[PictureQuestion]]

    def requests(self, num_adapters: int, images: Images, *, seed: int = 0) -> list[LoadRequest]:
        """Every adapter with every picture, or with the first one, in random order."""
        num_pictures = 1 if images == "same" else None
        chosen = [self.questions[adapter][:num_pictures] for adapter in sorted(self.questions)[:num_adapters]]
        found = [question.request() for of_adapter in chosen for question in of_adapter]
        random.Random(seed).shuffle(found)
        return found


def prepare_work(folder: Path, model: str, *, num_adapters: int, num_pictures: int) -> ServingWork:
    """Write the model and the adapters to `folder`, and choose the thresholds."""
    name = write_models(folder, model, num_adapters=num_adapters)
    return ask_thresholds(name, folder / "adapters", num_pictures=num_pictures)


def write_models(folder: Path, model: str, *, num_adapters: int, device: torch.device | str = "cpu") -> str:
    """Write the model, unless it is built in, and folders of adapters under `adapters`; the name of the model.

    Args:
        folder: Where to.
        model: "tiny", "small" or "facebook/sam3"; the last two have random weights.
        num_adapters: How many.
        device: Where they are made.
    """
    disable_progress_bar()
    name = "tiny" if model == "tiny" else str(write_random(folder / "model", model, device))
    base = load_base(name, local_files_only=True, device=device)
    for number in range(num_adapters):
        lora = LoraSettings(rank=RANK, alpha=2 * RANK, components=_KINDS[number % len(_KINDS)])
        write_adapter(base, folder / "adapters" / f"adapter_{number:02d}", lora, seed=number)
    return name


def ask_thresholds(name: str, adapters: Path, *, num_pictures: int, device: torch.device | str = "cpu") -> ServingWork:
    """Ask every adapter about every picture, for thresholds that keep as many object queries as usual."""
    from jobs.bench.plain_server import PlainSegmenter

    pictures = [draw_picture(number) for number in range(num_pictures)]
    plain = PlainSegmenter(find_base(name).path, adapters, device)
    questions = {
        adapter.name: [
            PictureQuestion(picture, adapter.name, _threshold(plain.scores(picture.jpeg, picture.prompt, adapter.name)))
            for picture in pictures
        ]
        for adapter in sorted(adapters.iterdir())
    }
    return ServingWork(name, adapters, questions)


def draw_picture(seed: int) -> Picture:
    """A scene as the tiny model knows them, with the name of one of its objects."""
    height, width = SIZE_HW
    scene = draw_scene(np.random.default_rng(seed), size=max(SIZE_HW))
    pixels_HW3 = np.ascontiguousarray(scene.image_HW3[:height, :width, ::-1])
    for quality in (90, 94, 97, 99):
        _, encoded = cv2.imencode(".jpg", pixels_HW3, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if len(encoded) >= MIN_JPEG_BYTES:
            break
    return Picture(encoded.tobytes(), scene.objects[0].noun)


def _threshold(scores_Q: Tensor) -> float:
    """Halfway between the last score that is kept and the first that is not, where rounding decides nothing."""
    best = scores_Q.sort(descending=True).values
    num_kept = max(1, round(KEPT * len(best)))
    return float(best[num_kept - 1 : num_kept + 1].mean())


def write_random(folder: Path, model: str, device: torch.device | str = "cpu") -> Path:
    """A configuration with random weights and the tokenizer of the tiny model.

    At full size a mask is the whole image or nothing: random weights make noise, which takes longer to encode than any
    real mask.
    """
    sam3 = random_model(model, device=device)
    side = cast(Any, sam3.config).image_size
    if model == FULL_SIZE:
        projection = cast(Any, sam3).mask_decoder.instance_projection
        nn.init.zeros_(projection.weight)
        nn.init.ones_(projection.bias)
        sam3.bfloat16()  # half the file
    sam3.save_pretrained(folder)
    mask_side = side // 14 * 4
    processor = Sam3Processor(
        image_processor=Sam3ImageProcessor(
            size={"height": side, "width": side}, mask_size={"height": mask_side, "width": mask_side}
        ),
        tokenizer=AutoTokenizer.from_pretrained(TINY_FOLDER, local_files_only=True),
    )
    processor.save_pretrained(folder)
    return folder


def write_adapter(base: LoadedBase, folder: Path, lora: LoraSettings, *, seed: int) -> Path:
    """Random weights whose update is not zero; without the geometry CLS token, which the stock forward lacks."""
    torch.manual_seed(seed)
    model = apply_lora(base.model, lora, geometry_cls=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    metadata = AdapterMetadata(
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        prompts=["thing"],
        resolution=base.resolution,
        geometry_cls=False,
        lora=lora.to_dict(),
    )
    save_adapter(model, folder, metadata)
    model.unload()
    return folder
