"""Questions about any images under any adapters, answered together: what a serving replica runs.

The vision tower runs once for an image and the text tower once for a prompt, for all adapters that leave them as they
are, and not at all for those seen before. Everything else runs once for a batch, whichever adapters its rows are under.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from sam3lora.data.images import MAX_MEGAPIXELS, ImageError, read_image, resize_image
from sam3lora.engine.detect import to_instances
from sam3lora.engine.detections import BoxPrompt, Instances, PostProcessing
from sam3lora.engine.device_errors import is_device_error, is_out_of_memory
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.features import BASE, FeatureSource, Resident
from sam3lora.engine.forward import MixedForward, Row
from sam3lora.engine.questions import Answer, Question
from sam3lora.engine.segmenter import find_device, find_precision, relative_cxcywh
from sam3lora.errors import UserError
from sam3lora.inference.predictor import BOXES_ALONE_PROMPT
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.weights import AdapterWeights, read_adapter_weights
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3

__all__ = ["Answer", "MixedBatchSegmenter", "PreparedImage", "Question", "is_out_of_memory"]

WARM_UP_KEY = "warm-up"


class MixedBatchSegmenter:
    """One base model, adapters in numbered slots, and batches that mix them.

    One thread, the model thread, may call what runs or changes the model; methods that say so may be called from any.

    Args:
        model: "tiny", a hub id or a folder.
        revision: Branch, tag or commit of a hub id.
        resolution: Side of the model's input in pixels; None is the model's own.
        device: None takes a GPU if there is one.
        precision: "float32", or "bfloat16" to compute by autocast; None is bfloat16 on a GPU that has it.
        num_slots: Adapters in memory.
        max_rank: Adapters of a larger rank are refused.
        image_cache_bytes: Images and their features that are kept.
        max_cached_prompts: Text features that are kept, at 32 KB each.
        max_rows: (image, prompt) pairs in one forward.
        max_images: Images that pass the vision tower together.
        compile_vision: ``torch.compile`` of the vision encoder, used while no adapter in a slot changes it.
        local_files_only: Do not ask the hub.

    Raises:
        UserError: The model cannot be loaded, or an argument is out of range.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        revision: str | None = None,
        resolution: int | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        num_slots: int = 16,
        max_rank: int = 256,
        image_cache_bytes: int = 2**30,
        max_cached_prompts: int = 4096,
        max_rows: int = 16,
        max_images: int = 8,
        compile_vision: bool = False,
        local_files_only: bool = False,
    ) -> None:
        self.device = find_device(device)
        self.precision = find_precision(precision, self.device)
        self.base: LoadedBase = load_base(
            model, revision=revision, device=self.device, resolution=resolution, local_files_only=local_files_only
        )
        if self.precision == "bfloat16":
            store_matrices_in(self.base.model, torch.bfloat16, text_tower=True)
        self._bank = AdapterBank(self.base.model, num_slots)
        self._forward = MixedForward(StagedSam3(self.base.model), self._bank, compile_vision=compile_vision)
        self._features = FeatureSource(
            self.base,
            self._forward,
            image_cache_bytes=image_cache_bytes,
            max_cached_prompts=max_cached_prompts,
            max_images=max_images,
        )
        self._residents: dict[int | None, Resident] = {None: BASE}
        # A compiled encoder makes one graph for one image and another for all larger batches.
        self._warm_up_images = max_images if compile_vision or self.device.type == "cuda" else 0
        self._counts: Counter[str] = Counter()
        self._max_rank = max_rank
        self._max_rows = max_rows

    @property
    def resolution(self) -> int:
        """Side of the model's input in pixels."""
        return self.base.resolution

    @property
    def counters(self) -> dict[str, int]:
        """Since the start, warm-up included; `image_cache_bytes` is what is kept. From any thread."""
        return self._features.counters | {name: self._counts[name] for name in ("forwards", "rows")}

    # ---- from any thread ------------------------------------------------------------------------------------------

    def prepare_image(
        self, data: bytes | np.ndarray, key: str, *, max_megapixels: float = MAX_MEGAPIXELS
    ) -> PreparedImage:
        """Decode an image, turn it as its EXIF orientation says, and bring it to the size of the model's input.

        Args:
            data: The bytes of a file, or uint8 (H, W, 3) RGB.
            key: Equal keys must be equal images.
            max_megapixels: Larger images are refused before they are decoded.

        Raises:
            ImageError: It cannot be read, or is too large.
        """
        if isinstance(data, bytes):
            data = read_image(data, orientation="exif", max_megapixels=max_megapixels)
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or 0 in data.shape:
            raise ImageError(f"expected an image of uint8 (H, W, 3), got {data.dtype} {data.shape}")
        height, width = data.shape[:2]
        return PreparedImage(key, resize_image(data, (self.resolution, self.resolution)), (height, width))

    def cached_image(self, key: str) -> PreparedImage | None:
        """An image that was asked about or kept, unless others have taken its place since."""
        return self._features.images.image(key)

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """
        Raises:
            UserError: A prompt is empty or has more than 32 tokens.
        """
        for prompt in prompts:
            self._features.token_ids(prompt)

    def read_adapter(self, folder: str | Path) -> AdapterWeights:
        """Read and check an adapter folder; nothing of the model changes.

        Raises:
            UserError: It is incomplete or damaged, made for another base, or cannot share a batch with others.
        """
        return read_adapter_weights(folder, self.base.model, max_rank=self._max_rank)

    def finish(self, answer: Answer) -> list[Instances]:
        """For each prompt what was found, with masks as RLE at the size of the image."""
        return [
            to_instances(prompt, answer.size_hw, kept) for prompt, kept in zip(answer.prompts, answer.kept, strict=True)
        ]

    # ---- from the model thread only -------------------------------------------------------------------------------

    def place_adapter(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot, in place of what is there."""
        self._residents.pop(slot, None)
        self._bank.put(slot, weights)
        self._residents[slot] = Resident(slot, weights.version, weights.components, weights.geometry_cls)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot."""
        self._residents.pop(slot, None)
        self._bank.clear(slot)

    def keep_image(self, image: PreparedImage) -> None:
        """Embed an image with the base, and keep it."""
        self._features.images.keep_image(image)
        with self._inference():
            self._features.vision([(image, BASE)])

    def drop_features(self) -> None:
        """Give back the memory of cached features; images stay known."""
        self._features.images.drop_features()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def warm_up(self) -> None:
        """Run what the first requests will need, so that they do not wait for it."""
        noise = np.random.default_rng(0).integers(0, 256, (self.resolution, self.resolution, 3), dtype=np.uint8)
        image = PreparedImage(WARM_UP_KEY, noise, noise.shape[:2])
        everything = PostProcessing(threshold=0.0)
        box = BoxPrompt((0, 0, self.resolution / 2, self.resolution / 2))
        others = [PreparedImage(f"{WARM_UP_KEY} {n}", noise, noise.shape[:2]) for n in range(self._warm_up_images)]
        for num_rows in sorted({1, self._max_rows}):
            prompts = tuple(f"object {number}" for number in range(num_rows))
            for boxes in ((), (box,)):
                self._check_warm([Question(image, prompts, boxes, post=everything)])
        self._check_warm([Question(other, ("object",), post=everything) for other in others])
        for used in (image, *others):
            self._features.images.forget(used.key)
        self._features.reset_counters()
        self._counts.clear()

    def answer(self, questions: Sequence[Question]) -> list[Answer | Exception]:
        """Answer all questions together, each as if it were alone.

        A question that cannot be answered gives its exception: `UserError` for a prompt that is empty or too long or a
        box outside its image, `LookupError` for an empty slot, whatever else breaks only this one.

        Raises:
            torch.OutOfMemoryError, MemoryError: Together they take too much memory: ask fewer at a time.
            RuntimeError: The device failed (`is_device_error`): no question can be answered any more.
        """
        answers: list[Answer | Exception | None] = [self._problem(question) for question in questions]
        possible = [number for number, problem in enumerate(answers) if problem is None]
        try:
            found: Sequence[Answer | Exception] = self._answer([questions[number] for number in possible])
        except Exception as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            if len(possible) == 1:
                found = [error]
            else:
                found = [one for number in possible for one in self.answer([questions[number]])]
        for number, answer in zip(possible, found, strict=True):
            answers[number] = answer
        return [answer for answer in answers if answer is not None]

    def _check_warm(self, questions: Sequence[Question]) -> None:
        for answer in self.answer(questions):
            if isinstance(answer, Exception):
                raise answer

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _problem(self, question: Question) -> Exception | None:
        if question.slot not in self._residents:
            return LookupError(f"slot {question.slot} holds no adapter")
        if not question.prompts and not question.boxes:
            return UserError("a question needs a prompt or a box")
        try:
            self.check_prompts(question.prompts)
            for box in question.boxes:
                relative_cxcywh(box, question.image.size_hw)
        except UserError as error:
            return error
        return None

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        if not questions:
            return []
        prompts_of = [question.prompts or (BOXES_ALONE_PROMPT,) for question in questions]
        residents = [self._residents[question.slot] for question in questions]
        for question in questions:
            self._features.images.keep_image(question.image)
        with self._inference():
            vision = self._features.vision(
                [(question.image, resident) for question, resident in zip(questions, residents, strict=True)]
            )
            text = self._features.text(
                [
                    (prompt, resident)
                    for prompts, resident in zip(prompts_of, residents, strict=True)
                    for prompt in prompts
                ]
            )
            rows = []
            for question, prompts, resident in zip(questions, prompts_of, residents, strict=True):
                boxes = tuple((relative_cxcywh(box, question.image.size_hw), box.label) for box in question.boxes)
                of_image = vision[question.image.key, resident.of("vision_encoder").version]
                how = (question.slot, boxes, resident.geometry_cls, question.post, question.masks)
                version = resident.of("text_encoder").version
                rows += [Row(of_image, text[prompt, version], *how) for prompt in prompts]
            kept = []
            for start in range(0, len(rows), self._max_rows):
                kept += self._forward.detect(rows[start : start + self._max_rows])
                self._counts["forwards"] += 1
            self._counts["rows"] += len(rows)
        answers = []
        for question, prompts in zip(questions, prompts_of, strict=True):
            answers.append(Answer(prompts, question.image.size_hw, kept[: len(prompts)]))
            kept = kept[len(prompts) :]
        return answers

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        half = self.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            yield
