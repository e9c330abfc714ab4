"""One worker of an evaluation: a base with its adapters, and the images it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sam3lora.engine.detections import Instances, PostProcessing
from sam3lora.engine.segmenter import EncodedImages, Segmenter
from sam3lora.evaluation.ask.split_results import Answers, read_images
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory

BASE = "base"


@dataclass(frozen=True)
class Models:
    """What is asked: adapters over one base, and the base itself; plain values, so that it travels to workers.

    Args:
        adapters: Label -> adapter folder.
        with_base: Ask the base model too.
        segmenter: Arguments of `Segmenter` but the adapters.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    with_base: bool = True
    segmenter: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        return [BASE] * self.with_base + list(self.adapters)

    def with_absolute_paths(self) -> Models:
        """As Ray workers need them, which run in other folders."""
        adapters = {label: str(Path(folder).expanduser().absolute()) for label, folder in self.adapters.items()}
        model = self.segmenter.get("model")
        if model not in (None, "tiny") and Path(model).expanduser().is_dir():
            model = str(Path(model).expanduser().absolute())
        return replace(self, adapters=adapters, segmenter={**self.segmenter, "model": model})


class EvaluationWorker:
    """Loads once, then answers batch after batch."""

    def __init__(
        self,
        models: Models,
        categories: Sequence[PromptedCategory],
        post: PostProcessing,
        max_prompts_per_forward: int = 8,
    ) -> None:
        self.labels = models.labels
        self.segmenter = Segmenter(adapters=models.adapters, **models.segmenter)
        self._categories = categories
        self._post = post
        self._max_prompts_per_forward = max_prompts_per_forward

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on beside the settings."""
        base = self.segmenter.base
        return {
            "base_model": base.name,
            "base_revision": base.revision,
            "base_fingerprint": base.fingerprint[:12],
            "resolution": base.resolution,
            "geometry_cls": {label: self.segmenter.geometry_cls(_adapter(label)) for label in self.labels},
            "precision": self.segmenter.precision,
            "device": str(self.segmenter.device),
            "num_queries": base.model.detr_decoder.query_embed.num_embeddings,
        }

    def ask(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Answers]:
        """Label -> answers; the images are read once, and seen once by all models that share a vision tower.

        Raises:
            ImageError: An image cannot be read.
        """
        images = self.segmenter.encode(read_images(records))
        prompts = [category.prompt for category in self._categories]
        found = {}
        for label in self.labels:
            found[label] = Answers.collect(records, self._categories, self.detect(label, images, prompts))
            images.forget(label)
        return found

    def detect(self, label: str, images: EncodedImages, prompts: Sequence[str]) -> list[list[Instances]]:
        """One model's detections of every prompt in every image."""
        return self.segmenter.detect(
            images,
            prompts,
            adapter=_adapter(label),
            post=self._post,
            max_prompts_per_forward=self._max_prompts_per_forward,
        )


def _adapter(label: str) -> str | None:
    return None if label == BASE else label
