"""What a worker of a batch run asks of images: the objects of prompts, or a label for each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sam3lora.data.ids import IdKey
from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.engine.detections import Detections
from sam3lora.engine.mask_codes import rle_box_xyxy
from sam3lora.errors import UserError
from sam3lora.inference.batch.image_list import ImageSource
from sam3lora.inference.dense.files import OVERLAYS, DenseFiles
from sam3lora.inference.dense.predictor import DensePredictor
from sam3lora.inference.dense.result import DenseResult
from sam3lora.inference.drawing import draw_instances, encode_image, mark_coco
from sam3lora.model.loading import LoadedBase
from sam3lora.model.tokenization import tokenize

if TYPE_CHECKING:
    from sam3lora.inference.batch.worker import WorkerSettings

_ADAPTER = "adapter"


class Asker(Protocol):
    """A loaded model, and what becomes of its answers."""

    @property
    def base(self) -> LoadedBase: ...

    def ask(self, images: Sequence[np.ndarray]) -> Sequence[Any]:
        """For each image, uint8 (H, W, 3) RGB, an answer for `results`."""
        ...

    def results(self, source: ImageSource, image: np.ndarray, answer: Any) -> list[dict[str, Any]]:
        """The answer as COCO results without the image id, which is known at the end of the run; its pictures are
        written."""
        ...

    def free_memory(self) -> None: ...


def load_asker(settings: WorkerSettings) -> Asker:
    """The model that a run has chosen.

    Raises:
        UserError: It cannot be loaded, or a prompt is too long, or earlier results came from another base.
    """
    asker: Asker = PromptAsker(settings) if settings.dense is None else LabelAsker(settings)
    expected, found = settings.base_fingerprint, asker.base.fingerprint
    if expected is not None and expected != found:
        raise UserError(
            f"{settings.output} holds results of another base model (fingerprint {expected[:12]}) than this "
            f"{asker.base.name} ({found[:12]}): choose another --output, or start anew with --overwrite"
        )
    return asker


class PromptAsker:
    """Asks for the objects of prompts."""

    def __init__(self, settings: WorkerSettings) -> None:
        choice = settings.choice
        self._settings = settings
        self._prompts, self._adapter = list(settings.categories), choice.adapter and _ADAPTER
        self.pool = AdapterPool(
            choice.model,
            adapters={_ADAPTER: choice.adapter} if choice.adapter else None,
            revision=choice.revision,
            resolution=choice.resolution,
            device=settings.device,
        )
        tokenize(self.base.tokenizer, self._prompts)  # a prompt that is too long: before any work

    @property
    def base(self) -> LoadedBase:
        return self.pool.base

    def ask(self, images: Sequence[np.ndarray]) -> list[list[Detections]]:
        return self.pool.detect(images, self._prompts, adapter=self._adapter, post=self._settings.post)

    def results(self, source: ImageSource, image: np.ndarray, answer: list[Detections]) -> list[dict[str, Any]]:
        categories = self._settings.categories
        found = [entry for one in answer for entry in _coco_results(one, categories[one.prompt])]
        if self._settings.overlays:
            self._draw(source, image, found)
        return found

    def free_memory(self) -> None:
        self.pool.free_memory()

    def _draw(self, source: ImageSource, image: np.ndarray, detections: Sequence[Mapping[str, Any]]) -> None:
        names = {id_: prompt for prompt, id_ in self._settings.categories.items()}
        path = self._settings.output / OVERLAYS / f"{source.name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(draw_instances(image, mark_coco(detections, names, image.shape[:2]))))


class LabelAsker:
    """Asks a dense folder for the label of each pixel: files of `DenseFiles`, and a COCO result for each foreground
    class that an image has."""

    def __init__(self, settings: WorkerSettings) -> None:
        choice = settings.choice
        assert choice.adapter is not None
        assert settings.dense is not None
        self._categories = settings.categories
        self.predictor = DensePredictor(
            Path(choice.adapter),
            choice.model,
            settings=settings.dense,
            revision=choice.revision,
            resolution=choice.resolution,
            device=settings.device,
        )
        self._files = DenseFiles(
            settings.output, settings.dense, overlays=settings.overlays, probabilities=settings.probabilities
        )

    @property
    def base(self) -> LoadedBase:
        return self.predictor.engine.base

    def ask(self, images: Sequence[np.ndarray]) -> list[DenseResult]:
        return self.predictor.predict(images)

    def results(self, source: ImageSource, image: np.ndarray, answer: DenseResult) -> list[dict[str, Any]]:
        self._files.write(source.name, answer)
        found: list[dict[str, Any]] = []
        for name, category_id in self._categories.items():
            if answer.area_px[name]:
                rle = answer.rle(name)
                x0, y0, x1, y1 = rle_box_xyxy(rle)
                score = round(answer.mean_probability(name), 6)
                box = [x0, y0, x1 - x0, y1 - y0]
                found.append({"category_id": category_id, "segmentation": rle, "bbox": box, "score": score})
        return found

    def free_memory(self) -> None:
        self.predictor.engine.free_memory()


def _coco_results(found: Detections, category_id: IdKey) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in result.items() if name != "image_id"}
        | {"category_id": category_id, "score": round(result["score"], 6)}
        for result in found.to_coco(0, 0)
    ]
