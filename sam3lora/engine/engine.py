"""The inference engine: one base model, adapters in slots, and prompts of many images answered together.

Evaluation, `Predictor`, batch jobs and serving all ask it. The vision tower runs once for an image and the text tower
once for a prompt, for all adapters that leave the tower unchanged, and not at all while the caches hold the features.
Everything else runs once for a batch, in which every row may have an adapter of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.images import MAX_MEGAPIXELS, ImageError, read_image, resize_image
from sam3lora.engine.clicks.decoder import CLICKS_COUNTED, ClickDecoder, ClickedObject
from sam3lora.engine.clicks.features import ClickableFeatures
from sam3lora.engine.clicks.prompt import ClickAnswer
from sam3lora.engine.dense_slots import DENSE_COUNTED, DenseSlots, LabelledImage
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.engine.device import find_device, find_precision
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.features import BASE, FeatureSource, SlotAdapter
from sam3lora.engine.forward import Forward, MixedForward
from sam3lora.engine.graphs.capture import Capturer, CudaCapturer, wants_cuda_graphs
from sam3lora.engine.graphs.forward import GraphedForward
from sam3lora.engine.prompted import PROMPTS_COUNTED, ObjectFinder, PromptedImage
from sam3lora.engine.selection import NotFiniteError, SmallDetections
from sam3lora.engine.transfers import pinned
from sam3lora.engine.warm_up import run_first_shapes
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.metadata import CLICKS, DENSE, DETECTION
from sam3lora.model.adapter.weights import AdapterSummary, AdapterWeights, fingerprint_once, read_adapter_weights
from sam3lora.model.any_adapter import AdapterReader
from sam3lora.model.clicks import MASK_LIMIT
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures

WARM_UP_KEY = "warm-up"
_PROBE_POST = PostProcessing(threshold=0.0, nms="none", max_detections=10)


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
        self._geometry_cls = geometry_cls
        self._adapters: dict[int | None, SlotAdapter] = {None: BASE._replace(geometry_cls=geometry_cls is not False)}
        self._finder = ObjectFinder(self._forward, plain, self._features, self._adapters, max_rows=max_rows)
        self._dense = DenseSlots(
            base.model.vision_encoder.backbone, plain, self._features, device=self.device, max_images=max_images
        )
        self._clicks = ClickDecoder(
            base,
            self._forward,
            self._features,
            self._adapters,
            num_slots=num_slots,
            half=self.precision == "bfloat16" and not in_training,
        )
        self._reader = AdapterReader(base, self._clicks.load_head, max_rank)
        # A compiled encoder makes one graph for one image and another for all larger batches.
        self._warm_up_images = max_images if compile_vision or self.device.type == "cuda" else 0
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
        rooms = (
            (self._finder.counts, PROMPTS_COUNTED),
            (self._dense.counts, DENSE_COUNTED),
            (self._clicks.counts, CLICKS_COUNTED),
        )
        return self._features.counters | {name: counts[name] for counts, names in rooms for name in names}

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
        self._finder.check_prompts(prompts)

    def read_adapter(self, folder: str | Path) -> AdapterWeights:
        """Read and check the folder of an adapter that finds objects of prompts; nothing of the model changes.

        Raises:
            UserError: It is incomplete or damaged, made for another base, or cannot share a batch with others.
        """
        return read_adapter_weights(folder, self.base.model, max_rank=self._max_rank)

    def read_any_adapter(self, folder: str | Path) -> AdapterWeights:
        """As `read_adapter`, for a folder of any task; one of task clicks loads the click head.

        Raises:
            UserError: As there; or it belongs to another resolution, head or click head.
        """
        weights = self._reader.read(folder)
        weights.trunk_digest  # noqa: B018 - computed here, as the model thread has no time for it
        return weights

    def summarise_adapter(self, folder: str | Path) -> AdapterSummary:
        """What is known of an adapter folder without its weights.

        Raises:
            UserError: That shows already that `read_any_adapter` would refuse it.
            OSError: A file cannot be read.
        """
        return self._reader.summarise(folder)

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
            self._clicks.put(slot, weights)
            geometry_cls = weights.geometry_cls if self._geometry_cls is None else self._geometry_cls
            self._adapters[slot] = SlotAdapter(
                slot, weights.version, weights.components, geometry_cls, weights.task, weights.trunk_digest
            )

    def check_adapter(self, slot: int) -> None:
        """Ask a fixed image under the adapter in a slot, so that every part that it changes runs once.

        Raises:
            NotFiniteError: An output is NaN or infinite: its weights are finite, but too large.
        """
        adapter = self._adapters[slot]
        if adapter.task == CLICKS:
            self.enable_clicks()
        with self._inference():
            if adapter.task == DETECTION:
                is_finite = self._finds_finite(adapter)
            elif adapter.task == DENSE:
                is_finite = self._dense.is_finite(self._probe, adapter)
            else:
                is_finite = self._clicks.is_finite(self._probe_of_base(ClickableFeatures), adapter)
        if not is_finite:
            raise NotFiniteError(
                "its outputs are NaN or infinite for a test image: the training that made it diverged, train it again "
                "with a lower learning rate"
            )

    def clear_adapter(self, slot: int) -> None:
        with self._features.vision_lock:
            self._adapters.pop(slot, None)
            self._bank.clear(slot)
            self._dense.clear(slot)
            self._clicks.clear(slot)

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
                for found in self._finder.run([PromptedImage(one, prompts, boxes, post=everything) for one in images]):
                    found.check_finite()

        run_first_shapes(
            run,
            replace(self._probe, features=None),
            self._features.images.forget,
            row_sizes=self._forward.warm_up_sizes(self._max_rows),
            image_sizes=self._forward.warm_up_sizes(self._warm_up_images),
        )
        self._features.reset_counters()
        for room in (self._finder, self._dense, self._clicks):
            room.counts.clear()

    def detect(self, images: Sequence[PromptedImage]) -> list[list[Detections]]:
        """For each image, for each of its prompts, its detections at the image's size.

        Masks are encoded as they are made, so memory does not grow with the number of prompts.

        Raises:
            UserError: A prompt is empty or too long, or a box is outside its image.
            NotFiniteError: An output of the model is NaN or infinite.
            LookupError: A slot is empty.
        """
        with self._inference():
            return self._finder.detect(images)

    def detect_small(self, images: Sequence[PromptedImage]) -> list[list[SmallDetections] | Exception]:
        """As `detect`, for a service: masks stay small, and a mistake in one image leaves the others alone.

        An image that cannot be answered gives its exception: `UserError` for a prompt that is empty or too long or a
        box outside its image, `NotFiniteError` where an output is NaN or infinite, `LookupError` for an empty slot, or
        whatever else fails only with this image.

        Raises:
            torch.OutOfMemoryError, MemoryError: Together they take too much memory: ask fewer at a time.
            RuntimeError: The device failed (`is_device_error`): nothing can be answered any more.
        """
        with self._inference():
            return self._finder.detect_small(images)

    def label_small(
        self, images: Sequence[LabelledImage], beside: Sequence[PromptedImage | ClickedObject] = ()
    ) -> list[np.ndarray | Exception]:
        """For each image the logits (N, h, w) of the dense adapter in its slot, as `detect_small` gives detections.

        Images that `detect_small` and `click` are asked for next, `beside` these, share their vision pass.

        Raises:
            torch.OutOfMemoryError, MemoryError, RuntimeError: As `detect_small`.
        """
        empty = LookupError("the slot holds no dense adapter")
        asked = [(one.image, self._adapters[one.slot]) for one in images if one.slot in self._dense]
        with self._inference():
            found = iter(self._dense.answer(asked, self._asked_next(beside)))
        return [next(found) if one.slot in self._dense else empty for one in images]

    def enable_clicks(self) -> None:
        """Load the click head, and keep what it reads of images that are encoded from now on.

        `click` does so too; images that were encoded before it pass the vision tower again when they are clicked.

        Raises:
            UserError: The base has no tracker, or a damaged one.
        """
        self._clicks.enable()

    def check_clicks(self, slot: int | None, click_slot: int | None) -> None:
        """Raise UserError if the click adapter in a slot was trained on another vision trunk than that of `slot`."""
        self._clicks.check(slot, click_slot)

    @property
    def tracker_fingerprint(self) -> str:
        """Of the base's click head, whatever adapters are in slots."""
        return fingerprint_once(self._clicks.load_head())

    @property
    def click_mask_side(self) -> int:
        """Side of the masks that clicks start from and answer with: low-resolution logits, as of detections."""
        return self._clicks.enable().mask_side

    def click(
        self, objects: Sequence[ClickedObject], beside: Sequence[PromptedImage] = ()
    ) -> list[ClickAnswer | Exception]:
        """For each object what the click head says, with logits on the host, as `detect_small` gives detections.

        Images that `detect_small` is asked for next, `beside` these, share their vision pass.

        Raises:
            UserError: The base has no tracker, or a damaged one.
            torch.OutOfMemoryError, MemoryError, RuntimeError: As `detect_small`.
        """
        self.enable_clicks()
        with self._inference():
            return self._clicks.answer(objects, self._asked_next(beside))

    def semantic_logits(self, images: Sequence[PromptedImage]) -> list[list[np.ndarray]]:
        """For each image, for each of its prompts, float32 (h, w): whether a pixel belongs to any object of the prompt.

        This is SAM 3's semantic head, which takes no part in detections.

        Raises:
            UserError: As for `detect`.
            NotFiniteError: An output of the model is NaN or infinite.
            LookupError: A slot is empty.
        """
        with self._inference():
            return self._finder.semantic_logits(images)

    # ---- masks that clicks start from, from any thread --------------------------------------------------------------

    def keep_mask(self, key: str, mask_mm: np.ndarray) -> str | None:
        """Keep logits (m, m) beside a cached image, as float16; returns their id, None if there is no room for them."""
        return self._features.images.keep_mask(key, mask_mm.clip(-MASK_LIMIT, MASK_LIMIT).astype(np.float16))

    def kept_mask(self, key: str, mask_id: str) -> np.ndarray | None:
        """The float16 logits (m, m) of a kept mask of an image; None if they, or the image, were evicted."""
        return self._features.images.mask(key, mask_id)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _asked_next(self, beside: Sequence[PromptedImage | ClickedObject]) -> list[tuple[PreparedImage, SlotAdapter]]:
        """Images and adapters of what will be answered."""
        found = []
        for one in beside:
            if isinstance(one, ClickedObject):
                if (maker := self._clicks.maker(one)) is not None:
                    found.append((one.image, maker))
            elif self._finder.problem(one) is None:
                found.append((one.image, self._adapters[one.slot]))
        return found

    def _finds_finite(self, adapter: SlotAdapter) -> bool:
        """Whether what an adapter finds in the probe is, with a box too if it changes what reads boxes."""
        box = BoxPrompt((0, 0, self.resolution / 2, self.resolution / 2))
        boxes = ((), (box,)) if "geometry_encoder" in adapter.components else ((),)
        image = self._probe_of_base(VisionFeatures)
        if "vision_encoder" in adapter.components:
            (features,) = self._features.encode([image], [adapter.slot])
            image = replace(image, features=features)
        asked = [PromptedImage(image, ("object",), shown, adapter.slot, _PROBE_POST) for shown in boxes]
        return all(found.is_finite for found in self._finder.run(asked))

    def _probe_of_base(self, kind: type[VisionFeatures]) -> PreparedImage:
        """The probe with features of the base, which stay with it."""
        if not isinstance(self._probe.features, kind):
            (of_base,) = self._features.encode([self._probe], [None])
            self._probe = replace(self._probe, features=of_base)
        return self._probe

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        half = self.precision == "bfloat16"
        with self._no_gradients(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            yield
