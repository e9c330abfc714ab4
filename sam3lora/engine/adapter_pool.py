"""Adapters by label over one base model, on the engine: what evaluation, `Predictor` and batch jobs use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from transformers import Sam3Model

from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.clicks.click import ClicksVision
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import is_adapter_folder, load_adapter, read_metadata
from sam3lora.model.adapter.metadata import AdapterMetadata, recorded_post_processing, refuse_other_tasks
from sam3lora.model.adapter.weights import NotLowRankError
from sam3lora.model.clicks.weights import read_click_metadata
from sam3lora.model.loading import LoadedBase, load_base

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ClickPlace(NamedTuple):
    """What answers clicks: an engine, and the slots of the adapter whose trunk they see and of the click adapter."""

    engine: Engine
    slot: int | None
    click_slot: int | None


class AdapterPool:
    """One base model in memory and any number of adapters over it.

    An adapter that PEFT loads but the bank cannot hold (`modules_to_save`, `lora_bias`, `target_parameters`, LoRA
    variants other than DoRA, modules other than Linear and plain Conv2d) is merged into a copy of the base of its own.

    `adapters` is label -> adapter folder, `click_adapter` a folder of task clicks. `model`, `revision` and `resolution`
    of None take those of the adapters, else "tiny" and the model's own; the other arguments are those of `Engine`.

    Raises:
        UserError: A model or adapter cannot be loaded, or the adapters do not go together.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        click_adapter: str | Path | None = None,
        revision: str | None = None,
        resolution: int | None = None,
        geometry_cls: bool | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        local_files_only: bool = False,
        max_rows: int = 8,
    ) -> None:
        folders = {label: Path(folder) for label, folder in (adapters or {}).items()}
        for folder in folders.values():
            _check_folder(folder)
        self.adapters: dict[str, AdapterMetadata | None] = {
            label: read_metadata(folder) for label, folder in folders.items()
        }
        for label, metadata in self.adapters.items():
            refuse_other_tasks(metadata, folders[label])
        together = dict(self.adapters)
        if click_adapter is not None:
            _check_folder(Path(click_adapter))
            together["of clicks"], _ = read_click_metadata(click_adapter)
        self._options: dict[str, Any] = {
            "precision": precision,
            "max_rank": None,
            "image_cache_bytes": 0,  # each image is asked once, for all its prompts and adapters together
            "max_rows": max_rows,
            "geometry_cls": geometry_cls,
        }
        name = (_common_value(together, "base_model") or "tiny") if model is None else model
        self._base_options: dict[str, Any] = {
            "revision": revision or (_common_value(together, "base_revision") if model is None else None),
            "resolution": _common_value(together, "resolution") if resolution is None else resolution,
            "local_files_only": local_files_only,
        }
        self.engine = Engine.load(
            name,
            device=device,
            num_slots=max(1, len(folders) + (click_adapter is not None)),
            **self._base_options,
            **self._options,
        )
        self._place: dict[str | None, tuple[Engine, int | None]] = {None: (self.engine, None)}
        self._numbers = count()
        for slot, (label, folder) in enumerate(folders.items()):
            try:
                self.engine.place_adapter(slot, self.engine.read_adapter(folder))
                self._place[label] = (self.engine, slot)
            except NotLowRankError as error:
                logger.warning("%s; it is merged into a copy of the base for this run", error)
                self._place[label] = (self._merged(folder), None)
        self._click_slot: int | None = None
        if click_adapter is not None:
            self._click_slot = len(folders)
            self.engine.place_adapter(self._click_slot, self.engine.read_any_adapter(click_adapter))

    @property
    def base(self) -> LoadedBase:
        return self.engine.base

    def recorded(self, adapter: str | None) -> PostProcessing:
        """The post-processing that an adapter records; the defaults for the base and for an adapter without any.

        Raises:
            UserError: There is no such adapter.
        """
        self.place(adapter)
        return recorded_post_processing(None if adapter is None else self.adapters[adapter])

    def geometry_cls(self, adapter: str | None) -> bool:
        engine, slot = self.place(adapter)
        return engine.geometry_cls(slot)

    def detect(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        *,
        adapter: str | None = None,
        post: PostProcessing | None = None,
        boxes: Sequence[Sequence[BoxPrompt]] | None = None,
        masks: bool = True,
    ) -> list[list[Detections]]:
        """Ask every prompt of every image: for each image, for each prompt, its detections.

        Args:
            images: uint8 (H, W, 3) RGB of any sizes.
            prompts: Texts of at most 32 tokens; may be empty if every image has boxes.
            adapter: None asks the base.
            post: None takes what the adapter records.
            boxes: For each image boxes that go with every prompt.

        Raises:
            UserError: A prompt is empty or too long, a box is outside its image, or there is no such adapter.
        """
        posts = {adapter: self.recorded(adapter) if post is None else post}
        return self.detect_each(images, [prompts] * len(images), posts, boxes=boxes, masks=masks)[adapter]

    def detect_each(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[str]],
        posts: Mapping[str | None, PostProcessing],
        *,
        boxes: Sequence[Sequence[BoxPrompt]] | None = None,
        masks: bool = True,
        lowest_score: float | None = None,
    ) -> dict[str | None, list[list[Detections]]]:
        """As `detect`, with several adapters together: for each adapter, for each image, for each of its prompts.

        `prompts` are those of each image; `posts` is adapter (None is the base) -> its post-processing. `lowest_score`
        is explained at `selection.Wanted`.
        """
        return self._ask(images, prompts, posts, Engine.detect, boxes=boxes, masks=masks, lowest_score=lowest_score)

    def semantic_each(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[str]], adapters: Iterable[str | None]
    ) -> dict[str | None, list[list[np.ndarray]]]:
        """For each adapter, for each image, for each of its prompts, the logits of `Engine.semantic_logits`."""
        posts = {adapter: PostProcessing() for adapter in adapters}
        return self._ask(images, prompts, posts, Engine.semantic_logits)

    def _ask(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Sequence[str]],
        posts: Mapping[str | None, PostProcessing],
        answer: Callable[[Engine, list[PromptedImage]], list[list[T]]],
        *,
        boxes: Sequence[Sequence[BoxPrompt]] | None = None,
        masks: bool = True,
        lowest_score: float | None = None,
    ) -> dict[str | None, list[list[T]]]:
        """What `answer` says of each image, for each adapter; those of one engine are asked together."""
        boxes = [()] * len(images) if boxes is None else boxes
        keys = [str(next(self._numbers)) for _ in images]
        prepared = [self.engine.prepare_image(image, key) for image, key in zip(images, keys, strict=True)]
        together: dict[Engine, list[tuple[str | None, PromptedImage]]] = {}
        for image, of_image, shown in zip(prepared, prompts, boxes, strict=True):
            for adapter, post in posts.items():
                engine, slot = self.place(adapter)
                asked = PromptedImage(image, tuple(of_image), tuple(shown), slot, post, masks, lowest_score)
                if asked.prompts or asked.boxes:
                    together.setdefault(engine, []).append((adapter, asked))
        found: dict[str | None, list[list[T]]] = {adapter: [[] for _ in images] for adapter in posts}
        position = {key: number for number, key in enumerate(keys)}
        for engine, questions in together.items():
            answers = answer(engine, [asked for _, asked in questions])
            for (adapter, asked), results in zip(questions, answers, strict=True):
                found[adapter][position[asked.image.key]] = results
        return found

    def free_memory(self) -> None:
        """Free what is kept for later: caches of features, and the device's unused memory."""
        for engine, _ in self._place.values():
            engine.drop_features()

    def place(self, adapter: str | None) -> tuple[Engine, int | None]:
        """The engine that holds an adapter, or the base, and its slot there.

        Raises:
            UserError: There is no such adapter.
        """
        if adapter not in self._place:
            known = ", ".join(self.adapters) or "none"
            raise UserError(f"there is no adapter {adapter!r}; loaded: {known}")
        return self._place[adapter]

    def place_clicks(self, adapter: str | None, vision: ClicksVision = "adapter") -> ClickPlace:
        """The engine that answers clicks, with the adapter or the base whose vision trunk they see.

        Raises:
            UserError: There is no such adapter, or the click adapter was not trained on that trunk.
        """
        engine, slot = self.place(None if vision == "base" else adapter)
        if self._click_slot is None:
            return ClickPlace(engine, slot, None)
        if engine is not self.engine:
            raise UserError(
                f"adapter {adapter!r} is merged into a copy of the base, and no click adapter was trained on its "
                "vision trunk: use clicks_vision base, or leave the click adapter out"
            )
        engine.check_clicks(slot, self._click_slot)
        return ClickPlace(engine, slot, self._click_slot)

    def _merged(self, folder: Path) -> Engine:
        base = load_base(self.base.name, device=self.engine.device, **self._base_options)
        peft_model, metadata = load_adapter(base.model, folder)
        merged = cast(Sam3Model, peft_model.merge_and_unload())
        wanted = self._options["geometry_cls"]
        if wanted is None and metadata is not None:
            wanted = metadata.geometry_cls
        return Engine(replace(base, model=merged), num_slots=1, **(self._options | {"geometry_cls": wanted}))


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


def _common_value(known: Mapping[str, AdapterMetadata | None], name: str) -> Any:
    """The value of a metadata field that all adapters agree on; None if none has it."""
    values = {label: getattr(metadata, name) for label, metadata in known.items() if metadata is not None}
    given = {label: value for label, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{label}: {value}" for label, value in given.items())
        raise UserError(
            f"these adapters differ in {name} ({listed}): use them one at a time, or set it for all of them"
        )
    return next(iter(given.values()), None)
