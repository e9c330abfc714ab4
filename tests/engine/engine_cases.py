"""A small base with random weights, adapters over it, prompted random images, and PEFT as the reference."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Sam3Model

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.features import to_pixel_values
from sam3lora.engine.prompted import relative_cxcywh
from sam3lora.engine.selection import Wanted, select_detections
from sam3lora.model.adapter.folder import load_adapter, save_adapter
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.loading import load_base
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.model.tokenization import tokenize

from ..model.conftest import make_sam3, randomise_adapter, save_base, small_config

EVERY = PostProcessing(threshold=0.0, nms="none")

# Name -> what it changes (a regular expression on module names), rank, and whether it was trained with the CLS token.
ADAPTERS: dict[str, tuple[str, int, bool]] = {
    "vision": (r"vision_encoder.*(q_proj|fc1|proj1|projection)|detr_decoder.*v_proj", 2, True),
    "text": (r"text_encoder.*(q_proj|fc2)|text_projection|detr_encoder.*fc1", 3, True),
    "detector": (r"detr_decoder.*(box_head|ref_point_head|presence_head|rpb).*|dot_product_scoring.*", 5, True),
    "geometry": (r"geometry_encoder.*(_project|final_proj|v_proj|o_proj)", 2, True),
    "no cls": (r"mask_decoder.*|detr_encoder.*q_proj", 4, False),
    "no cls vision": (r"vision_encoder.*o_proj|geometry_encoder.*final_proj", 1, False),
}


def spread(model: Sam3Model) -> Sam3Model:
    """Weights large enough that every input can be told from the output."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    return model


def write_base(folder: Path, window: int | None = None) -> Path:
    """`window` is the side of a ViT window in patches, of 8 x 8 patches."""
    if window is None:
        return save_base(folder, spread(make_sam3()))
    config = small_config()
    config.vision_config.backbone_config.window_size = window
    torch.manual_seed(0)
    return save_base(folder, spread(Sam3Model(config).eval()))


def write_adapter(folder: Path, base_folder: Path, name: str, seed: int) -> Path:
    return write_adapter_of(folder, base_folder, *ADAPTERS[name], seed)


def write_adapter_of(
    folder: Path, base_folder: Path, pattern: str, rank: int = 2, geometry_cls: bool = True, seed: int = 0
) -> Path:
    """An adapter of the modules whose names match the pattern."""
    base = load_base(str(base_folder))
    adaptable = (torch.nn.Linear, torch.nn.Conv2d)
    # the CLIP tower's own projection is a full name and the end of another
    names = [
        found
        for found, module in base.model.named_modules()
        if isinstance(module, adaptable) and re.fullmatch(pattern, found) and found != "text_encoder.text_projection"
    ]
    assert names, pattern
    exclude = "text_encoder.text_projection"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, exclude_modules=[exclude])
    with torch.random.fork_rng(devices=[]):  # the same weights whatever ran before
        torch.manual_seed(10 + seed)
        model = get_peft_model(base.model, config)
    randomise_adapter(model, seed)
    told = {"base_model": str(base_folder), "base_fingerprint": base.fingerprint}
    return save_adapter(model, folder, AdapterMetadata(**told, geometry_cls=geometry_cls))


def write_adapters(folder: Path, base_folder: Path) -> dict[str, Path]:
    return {name: write_adapter(folder / name, base_folder, name, seed) for seed, name in enumerate(ADAPTERS)}


def make_engine(base_folder: Path, adapters: dict[str, Path], **options) -> tuple[Engine, dict]:
    """An engine with the adapters placed, and name -> slot, where None is the base."""
    engine = Engine.load(str(base_folder), device="cpu", **options)
    slots: dict[str | None, int | None] = {None: None}
    for slot, (name, folder) in enumerate(adapters.items()):
        engine.place_adapter(slot, engine.read_adapter(folder))
        slots[name] = slot
    return engine, slots


def make_images(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(40, 200, (count, 2))
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def random_prompted_images(generator: np.random.Generator, engine, images, slots, count: int) -> list[PromptedImage]:
    prompted = []
    for _ in range(count):
        number = int(generator.integers(len(images)))
        image = engine.prepare_image(images[number], f"image {number}")
        height, width = image.size_hw
        boxes = []
        for _ in range(generator.choice([0, 0, 1, 3])):
            (x0, x1), (y0, y1) = (np.sort(generator.random(2)) for _ in range(2))
            xyxy = (x0 * width, y0 * height, x1 * width, y1 * height)
            boxes.append(BoxPrompt(tuple(map(float, xyxy)), int(generator.integers(2))))
        prompts = generator.choice(["crack", "hole", "a long prompt", "leaf"], generator.integers(1, 4), replace=False)
        slot = slots[list(slots)[generator.integers(len(slots))]]
        prompted.append(PromptedImage(image, tuple(map(str, prompts)), tuple(boxes), slot, EVERY))
    return prompted


class PeftReference:
    """PEFT's own layers on the plain model, one adapter, image and prompt at a time."""

    def __init__(self, adapters: dict[str, Path], base_folder: Path) -> None:
        self.base = load_base(str(base_folder))
        self._peft, self._cls = None, {None: True}
        self._slots = {name: f"adapter_{number}" for number, name in enumerate(adapters)}
        for name, folder in adapters.items():
            self._peft, metadata = load_adapter(self._peft or self.base.model, folder, adapter_name=self._slots[name])
            self._cls[name] = metadata.geometry_cls

    @torch.no_grad()
    def detect(self, image: np.ndarray, adapter: str | None, wanted: Wanted, boxes=()) -> Detections:
        if adapter is not None:
            self._peft.set_adapter(self._slots[adapter])
            return self._detect(image, adapter, wanted, boxes)
        with self._peft.disable_adapter():
            return self._detect(image, adapter, wanted, boxes)

    def _detect(self, image, adapter, wanted, boxes) -> Detections:
        base = self.base
        staged = StagedSam3(base.model, geometry_cls=self._cls[adapter])
        pixels = to_pixel_values([image], base.resolution, image_mean=base.image_mean, image_std=base.image_std)
        exemplars = {}
        if boxes:
            exemplars["boxes_cxcywh_BN4"] = torch.tensor([[relative_cxcywh(box, image.shape[:2]) for box in boxes]])
            exemplars["box_labels_BN"] = torch.tensor([[box.label for box in boxes]])
        text = staged.encode_text(*tokenize(base.tokenizer, [wanted.prompt]))
        index = torch.tensor([0])
        output = staged.detect(staged.encode_images(pixels), text, index, index, **exemplars)
        head = lambda rows: staged.mask_head(output, torch.tensor(rows)).instance_logits  # noqa: E731
        (found,) = select_detections(output, [wanted], head)
        return found.at_full_size()
