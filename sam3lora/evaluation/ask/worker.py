"""One worker of an evaluation: a base with its adapters, and the images it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.engine.detections import Detections
from sam3lora.evaluation.ask.reading import Asked, read_images
from sam3lora.evaluation.dense.class_counts import ClassCounts
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory
from sam3lora.evaluation.metrics.semantic import count_semantic
from sam3lora.evaluation.predictions import EncodedResults, encode_results
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.split_matches import Matcher, SplitMatches
from sam3lora.evaluation.split_results import SplitResults
from sam3lora.local_paths import absolute_base, absolute_path

if TYPE_CHECKING:
    from sam3lora.engine.dense import DenseEngine
    from sam3lora.engine.engine import Engine

BASE = "base"


@dataclass(frozen=True)
class Models:
    """The models of an evaluation: adapters over one base, and the base itself; plain values, so that they travel.

    `adapters` is label -> adapter folder; `options` are the other arguments of `AdapterPool`.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    with_base: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        return [BASE] * self.with_base + list(self.adapters)

    def with_absolute_paths(self) -> Models:
        """For Ray workers, which run in other folders."""
        adapters = {label: absolute_path(folder) for label, folder in self.adapters.items()}
        model = self.options.get("model")
        model = model and absolute_base(model)
        return replace(self, adapters=adapters, options={**self.options, "model": model})


class Batches(Protocol):
    """Batches of records by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sequence[dict[str, Any]]: ...


class ModelWorker:
    """Loads the models once, then asks them for the images of one batch after the other.

    Detections down to `lowest_score` are kept, or down to the lowest threshold of a model.
    """

    def __init__(self, models: Models, settings: EvaluationSettings, lowest_score: float) -> None:
        self.labels = models.labels
        self._pool = AdapterPool(adapters=models.adapters, max_rows=settings.max_prompts_per_forward, **models.options)
        self._posts = {
            adapter_of(label): settings.post_processing(self._pool.recorded(adapter_of(label))) for label in self.labels
        }
        self._on_bad_image = settings.on_bad_image
        self._lowest_score = min([lowest_score, *(post.lowest_threshold for post in self._posts.values())])

    def facts(self) -> dict[str, Any]:
        """The facts that the numbers depend on beside the settings."""
        return {
            **facts_of(self._pool.engine),
            "geometry_cls": {label: self._pool.geometry_cls(adapter_of(label)) for label in self.labels},
            "post": {label: self._posts[adapter_of(label)] for label in self.labels},
            "lowest_score": self._lowest_score,
            "num_queries": self._pool.base.model.detr_decoder.query_embed.num_embeddings,
        }

    def detect(
        self, images: Sequence[np.ndarray], prompts: Sequence[Sequence[str]]
    ) -> dict[str | None, list[list[Detections]]]:
        """Adapter (None is the base) -> the detections of each image for each of its prompts."""
        return self._pool.detect_each(images, prompts, self._posts, lowest_score=self._lowest_score)


class Answers(NamedTuple):
    """One model's results on a batch of images: matched, and as JSON."""

    matches: SplitMatches
    encoded: dict[int, EncodedResults]
    semantic: ClassCounts | None = None


class EvaluationWorker(ModelWorker):
    """Asks for all categories in every image, and matches what is found: masks stay on the worker."""

    def __init__(
        self,
        models: Models,
        categories: Sequence[PromptedCategory],
        settings: EvaluationSettings,
        lowest_score: float = 0.0,
    ) -> None:
        super().__init__(models, settings, lowest_score)
        self._categories = categories
        self._incomplete = settings.incomplete(categories)
        self._measures_semantic = settings.semantic

    def ask(self, records: Sequence[Mapping[str, Any]]) -> Asked:
        """Label -> `Answers`; all models are asked in one pass. Raises ImageError as `read_images`."""
        records, images, skipped = read_images(records, self._on_bad_image)
        image_ids = [record["image_id"] for record in records]
        semantic = self._semantic(records, images) if self._measures_semantic else {}
        answers = {}
        for label, results in self.results(records, images).items():
            matcher = Matcher(self._categories, self._posts[adapter_of(label)], self._incomplete)
            answers[label] = Answers(
                matcher.match(records, results), encode_results(results.predictions, image_ids), semantic.get(label)
            )
        return Asked(answers, skipped)

    def _semantic(self, records: Sequence[Mapping[str, Any]], images: Sequence[np.ndarray]) -> dict[str, ClassCounts]:
        """Label -> pixels of the semantic output."""
        prompts = [category.prompt for category in self._categories]
        adapters = [adapter_of(label) for label in self.labels]
        found = self._pool.semantic_each(images, [prompts] * len(records), adapters)
        return {
            label: count_semantic(records, self._categories, found[adapter_of(label)], self._incomplete)
            for label in self.labels
        }

    def results(self, records: Sequence[Mapping[str, Any]], images: Sequence[np.ndarray]) -> dict[str, SplitResults]:
        """Label -> results before they are matched."""
        prompts = [category.prompt for category in self._categories]
        found = self.detect(images, [prompts] * len(records))
        return {
            label: SplitResults.collect(records, self._categories, found[adapter_of(label)]) for label in self.labels
        }


def facts_of(engine: Engine | DenseEngine) -> dict[str, Any]:
    """The facts of a base and its engine that numbers depend on."""
    base = engine.base
    return {
        "base_model": base.name,
        "base_revision": base.revision,
        "base_fingerprint": base.fingerprint[:12],
        "resolution": base.resolution,
        "precision": engine.precision,
        "device": str(engine.device),
    }


def adapter_of(label: str) -> str | None:
    """The adapter of a model's label; None is the base."""
    return None if label == BASE else label
