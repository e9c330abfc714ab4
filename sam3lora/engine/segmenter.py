"""A base model with any number of adapters over it: what evaluation, inference and batch jobs ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from sam3lora.engine.detect import EVERYTHING, PADDING_LABEL, Exemplars, TextCache, detect_prompts
from sam3lora.engine.detections import BoxPrompt, Instances, PostProcessing
from sam3lora.engine.pixels import to_pixel_values
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import is_adapter_folder, load_adapter, read_metadata
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.components import component_of
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3, VisionFeatures

MAX_CACHED_PROMPTS = 4096  # at 32 KB each
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class EncodedImages:
    """Images ready to be asked: vision features are computed when they are first needed, then kept."""

    pixel_values_ICHW: Tensor
    sizes_hw: list[tuple[int, int]]
    features: dict[str | None, VisionFeatures] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.sizes_hw)

    def forget(self, adapter: str) -> None:
        """Drop the features of an adapter with a vision tower of its own, which no other can use."""
        self.features.pop(adapter, None)


@dataclass
class _Adapter:
    """`slot` is its name in the PEFT model, whose names may not hold dots or slashes."""

    slot: str
    metadata: AdapterMetadata | None
    adapts_vision: bool
    text_cache: TextCache
    staged: StagedSam3


class Segmenter:
    """One base model in memory; adapters are switched, not loaded again.

    The vision tower runs once per image for the base and for all adapters that leave it as it is, and once more for
    each adapter that changes it, whatever the number of prompts.

    Args:
        model: "tiny", a hub id or a folder; None takes the base of the adapters, or "tiny".
        adapters: Label -> adapter folder.
        revision: Branch, tag or commit of a hub id; None takes that of the adapters.
        resolution: Side of the model's input in pixels; None takes that of the adapters, or the model's own.
        geometry_cls: Whether text prompts are followed by the geometry CLS token; None does as each adapter was
            trained, and True for the base.
        device: None takes a GPU if there is one.
        precision: "float32", or "bfloat16" to compute by autocast; None is bfloat16 on a GPU that has it.
        local_files_only: Do not ask the hub.

    Raises:
        UserError: A model or adapter that cannot be loaded, or adapters that do not go together.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        revision: str | None = None,
        resolution: int | None = None,
        geometry_cls: bool | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        adapters = dict(adapters or {})
        for folder in adapters.values():
            _check_folder(Path(folder))
        known = {label: read_metadata(folder) for label, folder in adapters.items()}
        self.device = find_device(device)
        self.precision = find_precision(precision, self.device)
        self._geometry_cls = geometry_cls
        self.base: LoadedBase = load_base(
            (_agreed(known, "base_model") or "tiny") if model is None else model,
            revision=revision or (_agreed(known, "base_revision") if model is None else None),
            device=self.device,
            resolution=_agreed(known, "resolution") if resolution is None else resolution,
            local_files_only=local_files_only,
        )
        if self.precision == "bfloat16":
            store_matrices_in(self.base.model, torch.bfloat16, text_tower=True)
        self._peft: PeftModel | None = None
        self._adapters: dict[str, _Adapter] = {}
        self._text_cache: TextCache = {}
        self._staged = StagedSam3(self.base.model, geometry_cls=self.geometry_cls(None))
        for label, folder in adapters.items():
            self.add_adapter(label, folder)

    @property
    def adapters(self) -> dict[str, AdapterMetadata | None]:
        """Label -> what the adapter folder says about itself (None for a plain PEFT adapter)."""
        return {label: adapter.metadata for label, adapter in self._adapters.items()}

    def add_adapter(self, label: str, folder: str | Path) -> None:
        """Load one more adapter.

        Raises:
            UserError: The folder is incomplete or damaged, or made for another base.
        """
        if label in self._adapters:
            raise UserError(f"two adapters are called {label!r}: give them different names")
        slot = f"adapter_{len(self._adapters)}"
        self._peft, metadata = load_adapter(self._peft or self.base.model, folder, adapter_name=slot)
        names = get_peft_model_state_dict(self._peft, adapter_name=slot, save_embedding_layers=False)
        wanted = self._geometry_cls
        if wanted is None:
            wanted = True if metadata is None else metadata.geometry_cls
        components = {component_of(name) for name in names}
        self._adapters[label] = _Adapter(
            slot,
            metadata,
            "vision_encoder" in components,
            {} if "text_encoder" in components else self._text_cache,
            StagedSam3(self.base.model, geometry_cls=wanted),
        )

    def geometry_cls(self, adapter: str | None) -> bool:
        """Whether text prompts are followed by the geometry CLS token."""
        if adapter is not None:
            return self._adapter(adapter).staged.geometry_cls
        return self._geometry_cls is not False

    def shares_vision(self, adapter: str) -> bool:
        """Whether an adapter uses the base's vision features."""
        return not self._adapter(adapter).adapts_vision

    def encode(self, images: Sequence[np.ndarray]) -> EncodedImages:
        """Prepare uint8 (H, W, 3) RGB images of any sizes."""
        pixel_values_ICHW = to_pixel_values(
            images,
            self.base.resolution,
            image_mean=self.base.image_mean,
            image_std=self.base.image_std,
            device=self.device,
            dtype=next(self.base.model.parameters()).dtype,
        )
        return EncodedImages(pixel_values_ICHW, [image.shape[:2] for image in images])

    @torch.no_grad()
    def detect(
        self,
        images: EncodedImages,
        prompts: Sequence[str],
        *,
        adapter: str | None = None,
        post: PostProcessing = EVERYTHING,
        masks: bool = True,
        boxes: Sequence[Sequence[BoxPrompt]] | None = None,
        max_prompts_per_forward: int = 8,
    ) -> list[list[Instances]]:
        """Ask every prompt of every image: for each image, for each prompt, its `Instances`.

        Args:
            images: From `encode`; asking again with other prompts or adapters does not run the vision tower again.
            prompts: Non-empty texts of at most 32 tokens.
            adapter: Label of the adapter; None asks the base.
            post: Threshold, suppression or merging, and limit.
            masks: Whether masks are wanted.
            boxes: For each image boxes that go with every prompt.
            max_prompts_per_forward: Most (image, prompt) pairs at a time.

        Raises:
            UserError: A prompt that is empty or too long, a box outside its image, or no such adapter.
        """
        staged = self._staged if adapter is None else self._adapter(adapter).staged
        text_cache = self._text_cache if adapter is None else self._adapter(adapter).text_cache
        if len(text_cache) > MAX_CACHED_PROMPTS:
            text_cache.clear()
        with (
            self._active(adapter),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"),
        ):
            key = None if adapter is None or self.shares_vision(adapter) else adapter

            def vision() -> VisionFeatures:
                if key not in images.features:
                    images.features[key] = staged.encode_images(images.pixel_values_ICHW)
                return images.features[key]

            return detect_prompts(
                staged,
                self.base.tokenizer,
                images.pixel_values_ICHW,
                prompts,
                sizes_hw=images.sizes_hw,
                post=post,
                masks=masks,
                exemplars=self._exemplars(boxes, images.sizes_hw),
                vision=vision,
                max_prompts_per_forward=max_prompts_per_forward,
                text_cache=text_cache,
            )

    def _adapter(self, label: str) -> _Adapter:
        if label not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise UserError(f"there is no adapter {label!r}; loaded: {known}")
        return self._adapters[label]

    @contextlib.contextmanager
    def _active(self, adapter: str | None) -> Iterator[None]:
        if self._peft is None:
            yield
        elif adapter is None:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(self._adapters[adapter].slot)
            yield

    def _exemplars(
        self, boxes: Sequence[Sequence[BoxPrompt]] | None, sizes_hw: Sequence[tuple[int, int]]
    ) -> Exemplars | None:
        if boxes is None or not any(boxes):
            return None
        if len(boxes) != len(sizes_hw):
            raise ValueError(f"expected boxes for each of {len(sizes_hw)} images, got {len(boxes)}")
        most = max(len(of_image) for of_image in boxes)
        boxes_IN4 = torch.full((len(boxes), most, 4), float(PADDING_LABEL))
        labels_IN = torch.full((len(boxes), most), PADDING_LABEL)
        for image, (of_image, size_hw) in enumerate(zip(boxes, sizes_hw, strict=True)):
            for number, box in enumerate(of_image):
                boxes_IN4[image, number] = torch.tensor(relative_cxcywh(box, size_hw))
                labels_IN[image, number] = box.label
        return Exemplars(boxes_IN4.to(self.device), labels_IN.to(self.device))


def _check_folder(folder: Path) -> None:
    """Before the base model is loaded, which may take long."""
    if is_adapter_folder(folder):
        return
    if is_adapter_folder(folder / "best"):
        raise UserError(f"{folder} is the folder of a run: its adapter is {folder / 'best'}")
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} is a model of its own, not an adapter: name it as the model (--model {folder})")
    if not folder.is_dir():
        kind = "is a file, not an adapter folder" if folder.exists() else "does not exist"
        raise UserError(
            f"adapter folder {folder} {kind}: expected one written by `sam3lora train`, such as best/ of a run"
        )


def relative_cxcywh(box: BoxPrompt, size_hw: tuple[int, int]) -> tuple[float, float, float, float]:
    """Centre and size of a box in [0, 1] of the image's sides.

    Raises:
        UserError: It is not within the image, has no area, or its label is neither 0 nor 1.
    """
    height, width = size_hw
    x0, y0, x1, y1 = box.xyxy
    if box.label not in (0, 1):
        raise UserError(f"a box has label 1 (this is meant) or 0 (this is not), got {box.label}")
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"box {list(box.xyxy)} must be x0 y0 x1 y1 in pixels with x0 < x1 <= {width}, y0 < y1 <= {height}"
        )
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height


def find_device(device: torch.device | str | None) -> torch.device:
    """A number is a GPU's."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, str) and device.isdecimal() else device)
    except RuntimeError:
        raise UserError(f"device must be cpu, cuda, cuda:1 or a GPU's number, got {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {found} is not there: this process sees {torch.cuda.device_count()} GPUs; use cpu")
    return found


def find_precision(precision: str | None, device: torch.device) -> str:
    if precision is None:
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision not in PRECISIONS:
        raise UserError(f"precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
    return precision


def _agreed(known: Mapping[str, AdapterMetadata | None], name: str):
    """What the adapters say, if they say the same."""
    values = {label: getattr(metadata, name) for label, metadata in known.items() if metadata is not None}
    said = {label: value for label, value in values.items() if value is not None}
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{label}: {value}" for label, value in said.items())
        raise UserError(
            f"these adapters differ in {name} ({listed}): use them one at a time, or set it for all of them"
        )
    return next(iter(said.values()), None)
