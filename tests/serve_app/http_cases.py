"""A backend without a model, images and requests for tests of the HTTP side."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.label_palette import palette_image
from sam3lora.data.rle import encode_rle
from sam3lora.engine.detections import Detections
from sam3lora.inference.dense.files import encode_png
from serve_app.http.errors import ServeError
from serve_app.http.ingress import create_api
from serve_app.http.schemas import AdapterResponse
from serve_app.messages import (
    EVERY_ADAPTER,
    AdapterPage,
    AdapterQuery,
    AdapterRow,
    DenseCall,
    DenseReply,
    ImageFile,
    ImageReply,
    LabelledClass,
    RefineCall,
    RefinedMask,
    RefinedMasks,
    RefinedObject,
    RefineReply,
    SegmentCall,
    SegmentReply,
)
from serve_app.settings import Limits, ServeSettings

SIZE_HW = (48, 64)
KEY_VARIABLE = "SAM3LORA_TEST_KEYS"
METRICS = "# HELP sam3lora_queue_length Requests.\n# TYPE sam3lora_queue_length gauge\nsam3lora_queue_length 3.0\n"


def picture(size_hw: tuple[int, int] = SIZE_HW, format: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    """An image file of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


PNG = picture()
PNG_BASE64 = base64.b64encode(PNG).decode()
PNG_KEY = hashlib.sha256(PNG).hexdigest()


def rectangle(x0: int, y0: int, x1: int, y1: int, size_hw: tuple[int, int] = SIZE_HW) -> dict[str, Any]:
    """The RLE of a filled rectangle."""
    mask = np.zeros(size_hw, np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    rle = coco_mask.encode(mask)
    return {"size": list(size_hw), "counts": rle["counts"].decode()}


def found(prompt: str, num: int = 2, size_hw: tuple[int, int] = SIZE_HW, *, masks: bool = True) -> Detections:
    """Rectangles of falling score."""
    boxes = [(2 + row % 7, 3, 12 + row % 7, 9) for row in range(num)]
    return Detections(
        prompt=prompt,
        presence=0.75,
        size_hw=size_hw,
        scores=np.linspace(0.9, 0.6, num, dtype=np.float32),
        boxes_xyxy=np.array(boxes, np.float32).reshape(num, 4),
        rles=[rectangle(*box, size_hw) for box in boxes] if masks else None,
    )


def labels_of(call: DenseCall) -> DenseReply:
    """The upper rows are water, those below are background, in the form that the call asks for."""
    output = call.output or "label_png"
    height, width = SIZE_HW
    labels_HW = np.zeros(SIZE_HW, np.uint8)
    labels_HW[:12] = 1
    classes = []
    for value, name in enumerate(("background", "water")):
        mask_HW = labels_HW == value
        area_px = int(mask_HW.sum())
        masks = {
            "rle": encode_rle(mask_HW),
            "probability_png": encode_png(Image.fromarray(mask_HW.astype(np.uint8) * 255)),
        }
        shown = value if output == "label_png" else None
        classes.append(LabelledClass(name, area_px, area_px / (height * width), shown, masks.get(output)))
    png = encode_png(palette_image(labels_HW)) if output == "label_png" else None
    return DenseReply(SIZE_HW, classes, png, {"decode": 0.5, "forward": 2.0})


def masks_of(asked: RefinedObject, multimask: bool | None) -> RefinedMasks:
    """The box, or a square around the last click; smaller ones as the alternatives of a single click."""
    height, width = SIZE_HW
    if asked.box_xyxy is not None:
        x0, y0, x1, y1 = (round(value) for value in asked.box_xyxy)
    else:
        x, y = int(asked.clicks[-1].x), int(asked.clicks[-1].y)
        x0, y0, x1, y1 = max(0, x - 6), max(0, y - 6), min(width, x + 6), min(height, y + 6)
    alone = len(asked.clicks) == 1 and asked.box_xyxy is None and asked.mask is None
    number = 3 if multimask or (alone and multimask is None) else 1
    masks = [
        RefinedMask(0.9 - 0.1 * step, rectangle(x0 + step, y0 + step, x1, y1), f"msk_{step:032x}")
        for step in range(number)
    ]
    return RefinedMasks(masks, 0.75)


@dataclass
class FakeBackend:
    """Answers rectangles and labels; remembers calls. `block` keeps segment calls waiting until it is set."""

    answer: Callable[[SegmentCall], Any] | None = None
    block: asyncio.Event | None = None
    is_ready: bool = True
    calls: list[SegmentCall] = field(default_factory=list)
    kept: list[ImageFile] = field(default_factory=list)
    listed: list[AdapterQuery] = field(default_factory=list)
    num_cancelled: int = 0
    label_answer: Callable[[DenseCall], Any] | None = None
    labelled: list[DenseCall] = field(default_factory=list)
    refine_answer: Callable[[RefineCall], Any] | None = None
    refined: list[RefineCall] = field(default_factory=list)

    async def segment(self, call: SegmentCall) -> SegmentReply | ServeError:
        self.calls.append(call)
        if self.block is not None:
            try:
                await self.block.wait()
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        if self.answer is not None:
            return self.answer(call)
        if call.adapter not in (None, "cracks"):
            return ServeError("adapter_not_found", "no such adapter: GET /v1/adapters lists them")
        if call.image.data is None and call.image.key not in [image.key for image in self.kept]:
            return ServeError("image_not_found", "the image is not kept: upload it again")
        results = [found(prompt, masks=call.masks) for prompt in call.prompts or ("visual",)]
        ids = [[f"msk_{row:032x}" for row in range(len(one))] for one in results] if call.keep_masks else None
        return SegmentReply(SIZE_HW, results, {"decode": 0.5, "forward": 2.0}, ids)

    async def label(self, call: DenseCall) -> DenseReply | ServeError:
        self.labelled.append(call)
        if self.label_answer is not None:
            return self.label_answer(call)
        if call.image.data is None and call.image.key not in [image.key for image in self.kept]:
            return ServeError("image_not_found", "the image is not kept: upload it again")
        return labels_of(call)

    async def refine(self, call: RefineCall) -> RefineReply | ServeError:
        self.refined.append(call)
        if self.refine_answer is not None:
            return self.refine_answer(call)
        if call.image.data is None and call.image.key not in [image.key for image in self.kept]:
            return ServeError("image_not_found", "the image is not kept: upload it again")
        masks = [masks_of(asked, call.multimask) for asked in call.objects]
        return RefineReply(SIZE_HW, masks, {"decode": 0.5, "forward": 2.0})

    async def keep_image(self, image: ImageFile, timeout_s: float) -> ImageReply | ServeError:
        cached = image.key in [known.key for known in self.kept]
        self.kept.append(image)
        return ImageReply(image.key, SIZE_HW, cached)

    async def list_adapters(self, query: AdapterQuery = EVERY_ADAPTER) -> AdapterPage | ServeError:
        self.listed.append(query)
        cracks = AdapterResponse(
            id="cracks",
            task="detection",
            prompts=["crack"],
            rank=8,
            size_bytes=2048,
            adapts=["detr_decoder"],
            post_processing=PostProcessing(threshold=0.3, prompt_thresholds={"crack": 0.2}),
            resident=True,
        )
        return page_of(cracks, AdapterResponse(id="old", error="trained on another base model"))

    async def metrics(self) -> dict[str, str]:
        return {"first": METRICS}

    async def ready(self) -> bool:
        return self.is_ready


def page_of(*adapters: AdapterResponse, total: int | None = None, has_more: bool = False) -> AdapterPage:
    rows = [AdapterRow(info.id, info.resident, info.model_dump_json()) for info in adapters]
    return AdapterPage(rows, len(rows) if total is None else total, has_more, clicks=True)


def make_settings(**limits: Any) -> ServeSettings:
    values = {
        "max_body_bytes": 200_000,
        "max_megapixels": 0.01,
        "max_prompts": 4,
        "max_prompt_chars": 40,
        "max_boxes": 3,
    }
    return ServeSettings(limits=Limits(**(values | limits)), api_keys_variable=KEY_VARIABLE)


def make_client(backend: Any = None, **limits: Any) -> TestClient:
    return TestClient(create_api(make_settings(**limits), backend or FakeBackend()), raise_server_exceptions=True)


def multipart(fields: dict[str, Any] | str, image: bytes = PNG) -> dict[str, Any]:
    """Keyword arguments of `client.post`."""
    text = fields if isinstance(fields, str) else json.dumps(fields)
    return {"files": {"image": ("a.png", image)}, "data": {"request": text}}


def as_json(**fields: Any) -> dict[str, Any]:
    return {"json": {"prompts": ["crack"], "image_base64": PNG_BASE64} | fields}


def raw(query: str = "prompts=crack", image: bytes = PNG, kind: str = "image/png") -> dict[str, Any]:
    return {"params": query, "content": image, "headers": {"content-type": kind}}


def events(chunks: list[bytes]) -> Iterator[bytes]:
    """A body of unknown length."""
    yield from chunks
