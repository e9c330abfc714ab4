"""The inference engine: one base model, adapters in slots, and prompts of many images answered together.

Evaluation, `Predictor`, batch jobs and serving all ask it. The vision tower runs once for an image and the text tower
once for a prompt, for all adapters that leave the tower unchanged, and not at all while the caches hold the features.
Everything else runs once for a batch, in which every row may have an adapter of its own.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.images import MAX_MEGAPIXELS, ImageError, read_image, resize_image
from sam3lora.engine.clicks.decoder import CLICKS_COUNTED, ClickDecoder, ClickedObject
from sam3lora.engine.clicks.prompt import ClickAnswer
from sam3lora.engine.dense_slots import DENSE_COUNTED, DenseSlots, LabelledImage
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.device import find_device, find_precision, is_device_error, is_out_of_memory
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.features import BASE, FeatureSource, SlotAdapter
from sam3lora.engine.forward import Forward, MixedForward, Row
from sam3lora.engine.graphs.capture import Capturer, CudaCapturer, wants_cuda_graphs
from sam3lora.engine.graphs.forward import GraphedForward
from sam3lora.engine.selection import NotFiniteError, SmallDetections, Wanted
from sam3lora.engine.transfers import pinned
from sam3lora.engine.warm_up import run_first_shapes
from sam3lora.errors import UserError
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.weights import AdapterSummary, AdapterWeights, read_adapter_weights
from sam3lora.model.dense.weights import read_weights, summarise
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3, TextFeatures
from sam3lora.model.tokenization import PromptError

BOXES_ALONE_PROMPT = "visual"
"""SAM 3 was trained to read this text beside boxes that have no text of their own."""

WARM_UP_KEY = "warm-up"
_COUNTED = ("forwards", "rows")
_PROBE_POST = PostProcessing(threshold=0.0, nms="none", max_detections=10)


@dataclass(frozen=True)
class PromptedImage:
    """One image from `Engine.prepare_image` and what is wanted of it by the adapter in a slot, or by the base (None).

    Prompts have at most 32 tokens, and none are needed if there are boxes, which go with every prompt. `lowest_score`
    is explained at `selection.Wanted`.
    """

    image: PreparedImage
    prompts: tuple[str, ...]
    boxes: tuple[BoxPrompt, ...] = ()
    slot: int | None = None
    post: PostProcessing = field(default_factory=PostProcessing)
    masks: bool = True
    lowest_score: float | None = None

    @property
    def num_rows(self) -> int:
        return max(1, len(self.prompts))


class Engine:
    """One base model, adapters in numbered slots, and batches that mix them.

    One thread, the model thread, may call the methods that run or change the model; the first group of methods may be
    called from any thread. `encode_ahead` is for a second thread beside the model thread.

    Args:
        precision: "float32", or "bfloat16" to compute by autocast; None is bfloat16 on a GPU that has it.
        max_rank: Adapters of a larger rank are refused.
        image_cache_bytes: Limit of the cached images and their features.
        max_cached_prompts: Limit of the cached text features, at 32 KB each.
        max_rows: (image, prompt) pairs in one forward pass.
        max_images: Images that pass the vision tower together.
        geometry_cls: Whether the geometry CLS token follows text prompts; None does as each adapter was trained, and
            True for the base.
        compile_vision: `torch.compile` of the vision encoder, used while no adapter in a slot changes it.
        cuda_graphs: Whether the stages of the model are captured as CUDA graphs (`sam3lora.engine.graphs`) on a GPU;
            None does unless the environment variable SAM3LORA_CUDA_GRAPHS is 0.
        capturer: What captures them, for tests without a GPU.
        in_training: The model is being trained, with PEFT layers in it that slot None then includes. Weights stay as
            they are, and nothing is made that autograd could not use later.
    """

    def __init__(
        self,
        base: LoadedBase,
        *,
        precision: str | None = None,
        num_slots: int = 16,
        max_rank: int | None = 256,
        image_cache_bytes: int = 2**30,
        max_cached_prompts: int = 4096,
        max_rows: int = 16,
        max_images: int = 8,
        geometry_cls: bool | None = None,
        compile_vision: bool = False,
        cuda_graphs: bool | None = None,
        capturer: Capturer | None = None,
        in_training: bool = False,
    ) -> None:
        self.base = base
        self.device = next(base.model.parameters()).device
        self.precision = find_precision(precision, self.device)
        if self.precision == "bfloat16" and not in_training:
            store_matrices_in(base.model, torch.bfloat16, text_tower=True)
        self._bank = AdapterBank(base.model, num_slots)
        staged = StagedSam3(base.model)
        plain = MixedForward(staged, self._bank, compile_vision=compile_vision)
        self._plain = plain
        self._forward: Forward = plain
        if capturer is None and self.device.type == "cuda" and wants_cuda_graphs(cuda_graphs) and not in_training:
            capturer = CudaCapturer(self.device)
        if capturer is not None:
            self._forward = GraphedForward(
                staged, self._bank, plain, capturer, max_images=max_images, max_rows=max_rows
            )
        self._features = FeatureSource(
            base,
            self._forward,
            image_cache_bytes=image_cache_bytes,
            max_cached_prompts=max_cached_prompts,
            max_images=max_images,
        )
        self._dense = DenseSlots(
            base.model.vision_encoder.backbone, plain, self._features, device=self.device, max_images=max_images
        )
        self._clicks = ClickDecoder(base, self._forward, self._features)
        self._geometry_cls = geometry_cls
        self._adapters: dict[int | None, SlotAdapter] = {None: BASE._replace(geometry_cls=geometry_cls is not False)}
        # A compiled encoder makes one graph for one image and another for all larger batches.
        self._warm_up_images = max_images if compile_vision or self.device.type == "cuda" else 0
        self._counts: Counter[str] = Counter()
        noise = np.random.default_rng(0).integers(0, 256, (self.resolution, self.resolution, 3), dtype=np.uint8)
        self._probe = PreparedImage(WARM_UP_KEY, noise, noise.shape[:2])  # with the base's features once it was used
        self._max_rank = max_rank
        self._max_rows = max_rows
        self._no_gradients = torch.no_grad if in_training else torch.inference_mode

    @classmethod
    def load(
        cls,
        model: str = "tiny",
        *,
        revision: str | None = None,
        resolution: int | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        **options,
    ) -> Engine:
        """Load a base model ("tiny", a hub id or a folder) and start an engine on it with `options` of `Engine`.

        `resolution` is the side of the model's input in pixels; None is the model's own.

        Raises:
            UserError: The model cannot be loaded, or an argument is out of range.
        """
        found = find_device(device)
        find_precision(options.get("precision"), found)  # before the model is loaded, which may take long
        base = load_base(
            model, revision=revision, device=found, resolution=resolution, local_files_only=local_files_only
        )
        return cls(base, **options)

    @property
    def resolution(self) -> int:
        """Side of the model's input in pixels."""
        return self.base.resolution

    @property
    def counters(self) -> dict[str, int]:
        """Counts since the start, without the warm-up; `image_cache_bytes` is the cache's size. From any thread."""
        kinds = (self._counts, _COUNTED), (self._dense.counts, DENSE_COUNTED), (self._clicks.counts, CLICKS_COUNTED)
        return self._features.counters | {name: counts[name] for counts, names in kinds for name in names}

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
        pixels_RR3 = resize_image(data, (self.resolution, self.resolution))
        return PreparedImage(key, pinned(pixels_RR3, self.device), (height, width))

    def cached_image(self, key: str) -> PreparedImage | None:
        """A cached image; None if it was never kept or has been evicted."""
        return self._features.images.image(key)

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raise PromptError for a prompt that is empty or has more than 32 tokens."""
        for number, prompt in enumerate(prompts):
            try:
                self._features.token_ids(prompt)
            except PromptError as error:
                error.number = number
                raise

    def read_adapter(self, folder: str | Path) -> AdapterWeights:
        """Read and check the folder of an adapter that finds objects of prompts; nothing of the model changes.

        Raises:
            UserError: It is incomplete or damaged, made for another base, or cannot share a batch with others.
        """
        return read_adapter_weights(folder, self.base.model, max_rank=self._max_rank)

    def read_any_adapter(self, folder: str | Path) -> AdapterWeights:
        """As `read_adapter`, for a folder of either task.

        Raises:
            UserError: As there; or it labels pixels at another resolution, or lacks its head.
        """
        return read_weights(folder, self.base, max_rank=self._max_rank)

    def summarise_adapter(self, folder: str | Path) -> AdapterSummary:
        """What is known of an adapter folder without its weights. The first call computes the base's fingerprint.

        Raises:
            UserError: That shows already that `read_any_adapter` would refuse it.
            OSError: A file cannot be read.
        """
        return summarise(folder, self.base, max_rank=self._max_rank)

    # ---- from a second thread -------------------------------------------------------------------------------------

    @property
    def may_encode_ahead(self) -> bool:
        """Whether `encode_ahead` may run beside the model thread: on a CPU, where threads share no graphs."""
        return self.device.type == "cpu" and isinstance(self._forward, MixedForward)

    def has_features(self, image: PreparedImage, slot: int | None) -> bool:
        """Whether the image's features under the adapter in a slot are at hand. From any thread."""
        adapter = self._adapters.get(slot)
        return image.features is not None or (adapter is not None and self._features.has_features(image.key, adapter))

    def encode_ahead(self, wanted: Sequence[tuple[PreparedImage, int | None]]) -> list[PreparedImage]:
        """The images with their features under the adapters in these slots, while the model thread works on others.

        Raises:
            LookupError: A slot is empty.
        """
        with self._features.vision_lock, self._inference():  # no slot changes meanwhile
            adapters = [self._adapters[slot] for _, slot in wanted]
            for image, _ in wanted:
                self._features.images.keep_image(image)
            found = self._features.vision(list(zip([image for image, _ in wanted], adapters, strict=True)))
        return [
            replace(image, features=found[image.key, adapter.of("vision_encoder").version])
            for (image, _), adapter in zip(wanted, adapters, strict=True)
        ]

    # ---- from the model thread only -------------------------------------------------------------------------------

    def place_adapter(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot; an adapter that is there is replaced."""
        with self._features.vision_lock:
            self._adapters.pop(slot, None)
            self._bank.put(slot, weights)
            self._dense.put(slot, weights)
            geometry_cls = weights.geometry_cls if self._geometry_cls is None else self._geometry_cls
            self._adapters[slot] = SlotAdapter(slot, weights.version, weights.components, geometry_cls)

    def check_adapter(self, slot: int) -> None:
        """Ask a fixed image under the adapter in a slot, so that every part that it changes runs once.

        Raises:
            NotFiniteError: An output is NaN or infinite: its weights are finite, but too large.
        """
        adapter = self._adapters[slot]
        if slot in self._dense:
            with self._inference():
                if not self._dense.is_finite(self._probe, adapter):
                    raise _diverged()
            return
        box = BoxPrompt((0, 0, self.resolution / 2, self.resolution / 2))
        boxes = ((), (box,)) if "geometry_encoder" in adapter.components else ((),)
        with self._inference():
            if self._probe.features is None:
                (of_base,) = self._features.encode([self._probe], [None])
                self._probe = replace(self._probe, features=of_base)
            image = self._probe
            if "vision_encoder" in adapter.components:
                (features,) = self._features.encode([image], [slot])
                image = replace(image, features=features)
            asked = [PromptedImage(image, ("object",), shown, slot, _PROBE_POST) for shown in boxes]
            if not all(found.is_finite for found in self._run(asked)):
                raise _diverged()

    def clear_adapter(self, slot: int) -> None:
        with self._features.vision_lock:
            self._adapters.pop(slot, None)
            self._bank.clear(slot)
            self._dense.clear(slot)

    def geometry_cls(self, slot: int | None) -> bool:
        """Whether the geometry CLS token follows text prompts."""
        return self._adapters[slot].geometry_cls

    def keep_image(self, image: PreparedImage) -> None:
        """Embed an image with the base, and cache it."""
        self._features.images.keep_image(image)
        with self._inference():
            self._features.vision([(image, BASE)])

    def keep_text(self, features: Mapping[str, TextFeatures]) -> None:
        """Cache text features (P = 1 each) that the caller has made with slot None's text tower."""
        self._features.keep_text(features)

    def drop_features(self) -> None:
        """Free the memory of cached image features and of CUDA graphs; images stay cached."""
        self._features.images.drop_features()
        self._forward.free_memory()
        self._probe = replace(self._probe, features=None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def warm_up(self) -> None:
        """Run the shapes that the first requests will have, so that they do not wait for compilation or capture."""
        everything = PostProcessing(threshold=0.0, max_detections=10)

        def run(images: Sequence[PreparedImage], prompts: tuple[str, ...], boxes: tuple[BoxPrompt, ...]) -> None:
            """Without the codes of masks, which the device has no part in."""
            with self._inference():
                for found in self._run([PromptedImage(image, prompts, boxes, post=everything) for image in images]):
                    found.check_finite()

        run_first_shapes(
            run,
            replace(self._probe, features=None),
            self._features.images.forget,
            row_sizes=self._forward.warm_up_sizes(self._max_rows),
            image_sizes=self._forward.warm_up_sizes(self._warm_up_images),
        )
        self._features.reset_counters()
        self._counts.clear()
        self._dense.counts.clear()
        self._clicks.counts.clear()

    def detect(self, images: Sequence[PromptedImage]) -> list[list[Detections]]:
        """For each image, for each of its prompts, its detections at the image's size.

        Masks are encoded as they are made, so memory does not grow with the number of prompts.

        Raises:
            UserError: A prompt is empty or too long, or a box is outside its image.
            NotFiniteError: An output of the model is NaN or infinite.
            LookupError: A slot is empty.
        """
        for image in images:
            if problem := self._problem(image):
                raise problem
        with self._inference():
            found = (small.at_full_size() for small in self._run(images))
            return [list(islice(found, image.num_rows)) for image in images]

    def detect_small(self, images: Sequence[PromptedImage]) -> list[list[SmallDetections] | Exception]:
        """As `detect`, for a service: masks stay small, and a mistake in one image leaves the others alone.

        An image that cannot be answered gives its exception: `UserError` for a prompt that is empty or too long or a
        box outside its image, `NotFiniteError` where an output is NaN or infinite, `LookupError` for an empty slot, or
        whatever else fails only with this image.

        Raises:
            torch.OutOfMemoryError, MemoryError: Together they take too much memory: ask fewer at a time.
            RuntimeError: The device failed (`is_device_error`): nothing can be answered any more.
        """
        results: list[list[SmallDetections] | Exception | None] = [self._problem(image) for image in images]
        possible = [number for number, problem in enumerate(results) if problem is None]
        chosen = [images[number] for number in possible]
        found: Sequence[list[SmallDetections] | Exception]
        try:
            with self._inference():
                rows = self._run(chosen)
                found = [_finite(list(islice(rows, image.num_rows))) for image in chosen]
        except Exception as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            if len(possible) == 1:
                found = [error]
            else:  # find the image that fails
                found = [one for image in chosen for one in self.detect_small([image])]
        for number, result in zip(possible, found, strict=True):
            results[number] = result
        return [result for result in results if result is not None]

    def label_small(
        self, images: Sequence[LabelledImage], beside: Sequence[PromptedImage] = ()
    ) -> list[np.ndarray | Exception]:
        """For each image the logits (N, h, w) of the dense adapter in its slot, as `detect_small` gives detections.

        Images that `detect_small` is asked for next, `beside` these, share their vision pass.

        Raises:
            torch.OutOfMemoryError, MemoryError, RuntimeError: As `detect_small`.
        """
        empty = LookupError("the slot holds no dense adapter")
        asked = [(one.image, self._adapters[one.slot]) for one in images if one.slot in self._dense]
        others = [(one.image, self._adapters[one.slot]) for one in beside if self._problem(one) is None]
        with self._inference():
            found = iter(self._dense.answer(asked, others))
        return [next(found) if one.slot in self._dense else empty for one in images]

    def enable_clicks(self) -> None:
        """Load the click head, and keep what it reads of images that are encoded from now on.

        `click` does so too; images that were encoded before it pass the vision tower again when they are clicked.

        Raises:
            UserError: The base has no tracker, or a damaged one.
        """
        self._clicks.enable()

    @property
    def click_mask_side(self) -> int:
        """Side of the masks that clicks start from and answer with: low-resolution logits, as of detections."""
        return self._clicks.enable().mask_side

    def click(self, objects: Sequence[ClickedObject]) -> list[ClickAnswer | Exception]:
        """For each object what the click head says, with logits on the host, as `detect_small` gives detections.

        Raises:
            UserError: The base has no tracker, or a damaged one.
            torch.OutOfMemoryError, MemoryError, RuntimeError: As `detect_small`.
        """
        self.enable_clicks()
        finding = {slot: adapter for slot, adapter in self._adapters.items() if slot not in self._dense}
        with self._inference():
            return self._clicks.answer(objects, finding)

    def semantic_logits(self, images: Sequence[PromptedImage]) -> list[list[np.ndarray]]:
        """For each image, for each of its prompts, float32 (h, w): whether a pixel belongs to any object of the prompt.

        This is SAM 3's semantic head, which takes no part in detections.

        Raises:
            UserError: As for `detect`.
            NotFiniteError: An output of the model is NaN or infinite.
            LookupError: A slot is empty.
        """
        for image in images:
            if problem := self._problem(image):
                raise problem
        with self._inference():
            found = (
                logits.float().cpu().numpy() for logits in self._plain.semantic(self._rows(images), self._max_rows)
            )
            logits = [list(islice(found, image.num_rows)) for image in images]
        if not all(np.isfinite(one).all() for of_image in logits for one in of_image):
            raise NotFiniteError("the semantic outputs are NaN or infinite: the training of the adapter diverged")
        return logits

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _problem(self, image: PromptedImage) -> Exception | None:
        if image.slot not in self._adapters:
            return LookupError(f"slot {image.slot} holds no adapter")
        if image.slot in self._dense:
            return UserError("this adapter labels each pixel and finds no objects of prompts")
        if not image.prompts and not image.boxes:
            return UserError("no prompts: name what to look for, for example prompts=['crack'], or give boxes")
        try:
            self.check_prompts(image.prompts)
            for box in image.boxes:
                relative_cxcywh(box, image.image.size_hw)
        except UserError as error:
            return error
        return None

    def _run(self, images: Sequence[PromptedImage]) -> Iterator[SmallDetections]:
        """The detections of all prompts of all images, one after the other."""
        rows = self._rows(images)
        self._counts["forwards"] += -(-len(rows) // self._max_rows)
        self._counts["rows"] += len(rows)
        return self._forward.detect(rows, self._max_rows)

    def _rows(self, images: Sequence[PromptedImage]) -> list[Row]:
        """A row for each prompt of each image, with the features that it needs."""
        asked = [image if image.prompts else replace(image, prompts=(BOXES_ALONE_PROMPT,)) for image in images]
        adapters = [self._adapters[image.slot] for image in asked]
        for image in asked:
            if image.image.features is None:
                self._features.images.keep_image(image.image)
        vision = self._features.vision([(image.image, adapter) for image, adapter in zip(asked, adapters, strict=True)])
        text = self._features.text(
            [(prompt, adapter) for image, adapter in zip(asked, adapters, strict=True) for prompt in image.prompts]
        )
        rows = []
        for image, adapter in zip(asked, adapters, strict=True):
            size_hw = image.image.size_hw
            boxes = tuple((relative_cxcywh(box, size_hw), box.label) for box in image.boxes)
            of_image = vision[image.image.key, adapter.of("vision_encoder").version]
            maker = adapter.of("text_encoder").version
            for prompt in image.prompts:
                wanted = Wanted(prompt, size_hw, image.post, image.masks, image.lowest_score)
                rows.append(Row(of_image, text[prompt, maker], wanted, image.slot, boxes, adapter.geometry_cls))
        return rows

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        half = self.precision == "bfloat16"
        with self._no_gradients(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            yield


def _diverged() -> NotFiniteError:
    return NotFiniteError(
        "its outputs are NaN or infinite for a test image: the training that made it diverged, train it again with a "
        "lower learning rate"
    )


def _finite(found: list[SmallDetections]) -> list[SmallDetections] | NotFiniteError:
    if all(one.is_finite for one in found):
        return found
    return NotFiniteError("the outputs for this image are NaN or infinite")


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
