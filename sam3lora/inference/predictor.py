"""`Predictor`: a base model with or without an adapter, asked in Python for prompts or for labels of pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image

from sam3lora.config.post_processing import PostProcessing, PostProcessingOptions
from sam3lora.data.images import read_first_frame, rgb_from_pil
from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.engine.clicks.click import ClicksVision
from sam3lora.engine.detections import BoxPrompt, Detections
from sam3lora.errors import UserError
from sam3lora.inference.dense.predictor import DensePredictor, settings_of
from sam3lora.inference.dense.result import DenseResult
from sam3lora.inference.result_pictures import draw_results, write_picture
from sam3lora.model.adapter.metadata import is_dense_folder, refuse_other_tasks

if TYPE_CHECKING:
    from sam3lora.engine.clicks.interaction import SeedKind
    from sam3lora.inference.clicks.session import ClickSession

logger = logging.getLogger(__name__)

ImageSource = str | Path | bytes | Image.Image | np.ndarray
"""Path, bytes of a file, PIL image, or uint8 (H, W, 3) RGB."""

_ADAPTER = "adapter"


class Predictor:
    """Finds the objects that prompts name, or labels each pixel with an adapter of task dense.

        predictor = Predictor("tiny", adapter="outputs/run/best")
        results = predictor.predict("image.jpg", prompts=["crack", "pothole"])
        predictor.draw(results, "output.png")

        predictor = Predictor(adapter="outputs/dense/best")
        predictor.predict_dense("image.jpg").draw("output.png")

    Args:
        model: "tiny", a hub id or a folder; None takes the base of the adapters, or "tiny".
        adapter: Adapter folder; None asks the base model.
        click_adapter: Folder of task clicks, whose click head answers in `interact`; None is the base's. It may go with
            an adapter.
        revision: Branch, tag or commit of a hub id.
        resolution: Side of the model's input in pixels; None takes the adapter's, or the model's own.
        geometry_cls: Whether text prompts are followed by the geometry CLS token; None does as the adapter was
            trained.
        device: None takes a GPU if there is one.
        precision: "float32" or "bfloat16"; None is bfloat16 on a GPU that has it.
        local_files_only: Do not ask the hub.
        post: Fields of `PostProcessing`, such as `threshold=0.3`; the others are as the adapter records them, or the
            defaults. An adapter of task dense takes `threshold` alone, and only if its classes do not exclude each
            other.

    Raises:
        UserError: A model or adapter that cannot be loaded or do not belong together, or a value out of range.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        adapter: str | Path | None = None,
        click_adapter: str | Path | None = None,
        revision: str | None = None,
        resolution: int | None = None,
        geometry_cls: bool | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        local_files_only: bool = False,
        **post: Unpack[PostProcessingOptions],
    ) -> None:
        PostProcessing().changed(**post)  # a value out of range: before the model is loaded, which may take long
        self.adapter = None if adapter is None else Path(adapter).expanduser()
        self.click_adapter = None if click_adapter is None else Path(click_adapter).expanduser()
        options: dict[str, Any] = {
            "revision": revision,
            "resolution": resolution,
            "device": device,
            "precision": precision,
            "local_files_only": local_files_only,
        }
        self._dense: DensePredictor | None = None
        if self.adapter is not None and is_dense_folder(self.adapter):
            settings = settings_of(self.adapter, {**post, "geometry_cls": geometry_cls, "click_adapter": click_adapter})
            self._dense = DensePredictor(self.adapter, model, settings=settings, **options)
            return
        adapters = {} if self.adapter is None else {_ADAPTER: self.adapter}
        options |= {"adapters": adapters, "click_adapter": self.click_adapter, "geometry_cls": geometry_cls}
        self._pool = AdapterPool(model, **options)
        self._label = None if self.adapter is None else _ADAPTER
        self.post = self._pool.recorded(self._label).changed(**post)

    @property
    def settings(self) -> dict[str, Any]:
        """Model and post-processing, or classes of a dense adapter, as JSON values."""
        if self._dense is not None:
            return self._dense.describe()
        base = self._pool.base
        return {
            "model": base.name,
            "revision": base.revision,
            "adapter": None if self.adapter is None else str(self.adapter),
            **({} if self.click_adapter is None else {"click_adapter": str(self.click_adapter)}),
            "resolution": base.resolution,
            **self.post.model_dump(mode="json"),
        }

    def predict(
        self,
        image: ImageSource,
        prompts: str | Sequence[str] | None = None,
        boxes: ArrayLike | None = None,
        box_labels: Sequence[int] | None = None,
        *,
        masks: bool = True,
    ) -> list[Detections]:
        """Ask an image for prompts; the vision tower runs once.

        A file is turned as its EXIF orientation says, and all pixels are those of the turned image; of an animation or
        a file of several pages the first frame is asked.

        Args:
            image: Path, bytes of a file, PIL image, or uint8 (H, W, 3) RGB.
            prompts: Short noun phrases of at most 32 tokens; may be left out if there are boxes.
            boxes: (N, 4) x0 y0 x1 y1 in pixels: examples that go with every prompt.
            box_labels: For each box 1 (this is meant) or 0 (this is not); None is 1 for all.
            masks: Whether the results shall have masks. Suppression by masks and merging make them in any case.

        Returns:
            For each prompt, in the given order, its result.

        Raises:
            ImageError: The image cannot be read.
            UserError: No prompt, an empty or too long one, or a box outside the image.
        """
        return self._ask([_load(image)], prompts, boxes, box_labels, masks)[0]

    def predict_many(
        self, images: Sequence[ImageSource], prompts: str | Sequence[str], *, masks: bool = True, batch_size: int = 4
    ) -> list[list[Detections]]:
        """Ask several images for the same prompts, `batch_size` images at a time.

        Returns:
            For each image, for each prompt, its result; every result holds on to its image.

        Raises:
            ImageError: An image cannot be read.
            UserError: As `predict`.
        """
        results: list[list[Detections]] = []
        for batch in _batches(images, batch_size):
            results += self._ask(batch, prompts, None, None, masks)
        return results

    def predict_dense(self, image: ImageSource) -> DenseResult:
        """Label each pixel of an image, which is read as by `predict`.

        Raises:
            ImageError: The image cannot be read.
            UserError: The adapter is not of task dense, or memory runs out.
        """
        return self.predict_dense_many([image])[0]

    def predict_dense_many(self, images: Sequence[ImageSource], *, batch_size: int = 4) -> list[DenseResult]:
        """Label each pixel of several images, `batch_size` images at a time; every result holds on to its image.

        Raises:
            ImageError: An image cannot be read.
            UserError: As `predict_dense`.
        """
        if self._dense is None:
            raise UserError(
                f"{self.adapter or 'the base model'} is not of task dense: it finds the objects of prompts. Use predict"
            )
        return [result for batch in _batches(images, batch_size) for result in self._dense.predict(batch)]

    def interact(
        self,
        image: ImageSource,
        *,
        start_from: SeedKind = "both",
        clicks_vision: ClicksVision = "adapter",
        max_hole_area: int = 0,
        max_sprinkle_area: int = 0,
    ) -> ClickSession:
        """Begin to show and correct objects of an image, which is read as by `predict`, by clicks and boxes.

        Args:
            start_from: What of a found object goes with the first clicks on it: its "mask", its "box", or "both".
            clicks_vision: Whether clicks see the image as the "adapter" has changed the vision tower, or as the "base"
                does, which takes a second vision pass.
            max_hole_area, max_sprinkle_area: Up to which area holes are filled in masks that clicks make, and specks
                are taken out of them, in pixels of the low-resolution mask; see `MaskCleaning`. 0 leaves them.

        Raises:
            ImageError: The image cannot be read.
            UserError: The base has no click head, the adapter is of task dense, the click adapter was trained on
                another vision trunk than clicks see here, or an option is unknown.
        """
        from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
        from sam3lora.inference.clicks.session import ClickSession

        self._refuse_dense()
        cleaning = MaskCleaning(max_hole_area, max_sprinkle_area)
        if clicks_vision not in get_args(ClicksVision):
            raise UserError(f"clicks_vision must be one of {', '.join(get_args(ClicksVision))}, got {clicks_vision!r}")
        finding, clicking = self._pool.place(self._label), self._pool.place_clicks(self._label, clicks_vision)
        name = Path(image).name if isinstance(image, str | Path) else "image"
        return ClickSession(
            finding,
            clicking,
            _load(image),
            post=self.post,
            file_name=name,
            start_from=start_from,
            cleaning=cleaning,
        )

    def draw(
        self,
        results: Sequence[Detections],
        path: str | Path | None = None,
        *,
        show_boxes: bool = False,
        show_masks: bool = True,
        show_labels: bool = True,
    ) -> np.ndarray:
        """Draw the results of one image over it, and write the picture if there is a path; see `draw_results`.

        Raises:
            UserError: The file cannot be written.
        """
        picture_HW3 = draw_results(results, show_boxes=show_boxes, show_masks=show_masks, show_labels=show_labels)
        if path is not None:
            write_picture(path, picture_HW3)
        return picture_HW3

    def _ask(
        self,
        images: Sequence[np.ndarray],
        prompts: str | Sequence[str] | None,
        boxes: ArrayLike | None,
        box_labels: Sequence[int] | None,
        masks: bool,
    ) -> list[list[Detections]]:
        self._refuse_dense()
        exemplars = _exemplars(boxes, box_labels)
        asked = [prompts] if isinstance(prompts, str) else list(prompts or ())
        if not asked and not exemplars:
            raise UserError("no prompts: name what to look for, for example prompts=['crack'], or give boxes")
        found = self._pool.detect(
            images, asked, adapter=self._label, post=self.post, boxes=[exemplars] * len(images), masks=masks
        )
        for image_HW3, of_image in zip(images, found, strict=True):
            for detections in of_image:
                detections.image_HW3 = image_HW3
        return found

    def _refuse_dense(self) -> None:
        if self._dense is not None:
            refuse_other_tasks(self._dense.engine.metadata, self._dense.folder)


def _batches(images: Sequence[ImageSource], size: int) -> Iterator[list[np.ndarray]]:
    if size < 1:
        raise UserError(f"batch_size must be positive, got {size}")
    for start in range(0, len(images), size):
        yield [_load(image) for image in images[start : start + size]]


def _load(image: ImageSource) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"an image array must be uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}")
        return image
    if isinstance(image, Image.Image):
        return rgb_from_pil(image)
    if not isinstance(image, str | Path | bytes):
        raise UserError(f"an image must be a path, bytes, a PIL image or an array, got {type(image).__name__}")
    pixels_HW3, has_more = read_first_frame(image)
    if has_more:
        name = "image bytes" if isinstance(image, bytes) else image
        logger.warning("%s holds several frames or pages: only the first is used", name)
    return pixels_HW3


def _exemplars(boxes: ArrayLike | None, labels: Sequence[int] | None) -> list[BoxPrompt]:
    if boxes is None or np.size(boxes) == 0:
        if labels is not None and len(labels):
            raise UserError(f"{len(labels)} box labels without boxes")
        return []
    try:
        boxes_N4 = np.asarray(boxes, dtype=float)
    except (TypeError, ValueError):
        raise UserError(f"boxes must be numbers x0 y0 x1 y1 in pixels, got {boxes!r}") from None
    if boxes_N4.ndim != 2 or boxes_N4.shape[1] != 4:
        raise UserError(f"boxes must have the shape (N, 4), x0 y0 x1 y1 in pixels, got {boxes_N4.shape}")
    labels = [1] * len(boxes_N4) if labels is None else labels
    if len(labels) != len(boxes_N4):
        raise UserError(f"expected a label for each of {len(boxes_N4)} boxes, got {len(labels)}")
    return [BoxPrompt((box[0], box[1], box[2], box[3]), label) for box, label in zip(boxes_N4.tolist(), labels)]
