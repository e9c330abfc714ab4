"""The validation loss and the metrics of the adapter while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from sam3lora.config import Config
from sam3lora.data.bad_images import SkippedImage
from sam3lora.data.coco import CocoIndex
from sam3lora.data.images import ImageError
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.evaluation.ask.run import asked_categories
from sam3lora.evaluation.metrics.ground_truth import SplitTruth, prompted_categories
from sam3lora.evaluation.metrics.measure import measure_matches
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.split_matches import Matcher, SplitMatches
from sam3lora.evaluation.split_results import SplitResults
from sam3lora.model.loading import LoadedBase
from sam3lora.model.staged.forward import VisionFeatures
from sam3lora.training import distributed
from sam3lora.training.datasets import BatchSource, RunData
from sam3lora.training.gone_images import run_without_images
from sam3lora.training.step import LossRunner, StepCounts, TermSums
from sam3lora.training.task import Runner

LOGGED = ("map", "map_50", "map_75", "bbox_map", "cgf1", "off_prompt_fpr", "presence_accuracy")


def evaluation_settings(config: Config) -> EvaluationSettings:
    """The settings of a configuration for measuring its models."""
    data, training = config.data, config.training
    sizes = {name: getattr(training, name) for name in ("batch_size", "max_prompts_per_forward")}
    return EvaluationSettings(
        post=dict(config.evaluation.post_processing),
        num_samples=config.evaluation.num_samples,
        annotation_file=data.annotation_file,
        categories=data.categories,
        prompts=data.prompts,
        negative_prompts=data.negative_prompts,
        exhaustive=data.exhaustive,
        lowest_score=config.evaluation.lowest_score,
        on_bad_image=training.on_bad_image,
        **{name: number for name, number in sizes.items() if number != "auto"},
    )


@dataclass
class Validator:
    """Measures what learns on the validation split. Each worker takes its own share of the images.

    ``skipped`` has the bad images that the last `loss_terms` left out, of all workers.
    ``measures_base`` says whether metrics before the first step are worth their time.
    """

    measures_base: ClassVar[bool] = False

    config: Config
    base: LoadedBase
    model: nn.Module
    runner: Runner
    data: RunData
    batches: BatchSource
    skipped: list[SkippedImage] = field(default_factory=list)

    def loss_terms(self) -> TermSums | None:
        """The loss terms over `BatchSource.num_validated` images, the same ones as in training but without dropout.

        None without a validation split.
        """
        self.skipped = []
        if self.data.valid is None:
            return None
        self.model.eval()
        sums, skipped = TermSums(self.runner.weights), []
        with closing(self.batches.validation_batches()) as batches:
            for batch in batches:
                skipped += batch.skipped
                if self.runner.has_loss(batch):
                    counts = StepCounts.of([batch])
                    terms = self.runner.evaluate(batch, counts.normalizer())
                    sums.add({name: value.item() for name, value in terms.items()}, counts)
        merged = TermSums(sums.weights)
        for other_sums, other_counts, other_skipped in distributed.gather_objects((sums.sums, sums.counts, skipped)):
            for name, value in other_sums.items():
                merged.sums[name] = merged.sums.get(name, 0.0) + value
            merged.counts = StepCounts.from_tensor(merged.counts.tensor() + other_counts.tensor())
            self.skipped += other_skipped
        if self.skipped and not merged.counts.num_images:
            raise run_without_images("validation images", self.skipped)
        return merged

    def metrics(self) -> dict[str, Any]:
        """Metrics of the task, over ``evaluation.num_samples`` images or all."""
        raise NotImplementedError

    def my_records(self, size: int = 1) -> Iterator[list[dict[str, Any]]]:
        """Records of this worker's share of the images that metrics are of, so many at a time."""
        index = self.data.valid_complete
        assert index is not None
        rows = range(len(index))[: self.config.evaluation.num_samples]
        mine = rows[distributed.rank() :: distributed.world_size()]
        for start in range(0, len(mine), size):
            yield [index.record(row) for row in mine[start : start + size]]


class Meter(Protocol):
    """Adds up measurements of images; `other` is of the same kind."""

    def merge(self, other: Any) -> None: ...
    def values(self) -> dict[str, Any]: ...


def values_of_all(meter: Meter) -> dict[str, Any]:
    """The values of what all workers have measured."""

    def measure(parts: list[Meter]) -> dict[str, Any]:
        whole = parts[0]
        for part in parts[1:]:
            whole.merge(part)
        return whole.values()

    return distributed.on_first_worker(meter, measure)


@dataclass
class DetectionValidator(Validator):
    """Measures an adapter that finds objects of prompts."""

    model: PeftModel
    runner: LossRunner

    def metrics(self) -> dict[str, Any]:
        """The `LOGGED` metrics, as `validate` measures them, over ``evaluation.num_samples`` images or all."""
        runner, settings = self.runner, evaluation_settings(self.config)
        post = self.config.evaluation.post_processing
        index = self.data.valid_complete
        assert index is not None
        index = index.first(settings.num_samples)
        categories = asked_categories(index, settings) or prompted_categories(index, self.data.prompts)
        runner.text.add([category.prompt for category in categories])
        matcher = Matcher(categories, post, settings.incomplete(categories))
        with _evaluation_mode(self.model), torch.no_grad():
            engine = self._engine(settings.max_prompts_per_forward)
            engine.keep_text(runner.text.kept())
            with torch.autocast(runner.device.type, dtype=torch.bfloat16, enabled=runner.bf16):
                mine = ask_split(
                    engine,
                    index.select_rows(range(len(index))[distributed.rank() :: distributed.world_size()]),
                    matcher,
                    encode=runner.images.of_records,
                    lowest_score=settings.score_floor(len(index) * len(categories)),
                    batch_size=settings.batch_size,
                    skip_unreadable=self.config.training.on_bad_image == "skip",
                )

        def measure(parts: list[SplitMatches]) -> dict[str, Any]:
            read = np.concatenate([part.image_ids for part in parts])
            seen = np.isin(index.table.column("image_id").to_numpy(), read)
            truth = SplitTruth(index.select_rows(np.flatnonzero(seen).tolist()), categories)
            found = measure_matches(truth, SplitMatches.join(parts, truth.image_ids, len(categories)), matcher)
            return {name: getattr(found, name) for name in LOGGED}

        return distributed.on_first_worker(mine, measure)

    def _engine(self, max_rows: int) -> Engine:
        """An engine on the model that is being trained, whose PEFT layers stay in it."""
        return Engine(
            self.base,
            precision="bfloat16" if self.runner.bf16 else "float32",
            num_slots=1,
            image_cache_bytes=0,
            max_cached_prompts=10**6,
            max_rows=max_rows,
            geometry_cls=self.config.model.geometry_cls,
            in_training=True,
        )


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


def ask_split(
    engine: Engine,
    index: CocoIndex,
    matcher: Matcher,
    *,
    encode: Callable[[Sequence[Mapping[str, Any]]], VisionFeatures],
    lowest_score: float = 0.0,
    batch_size: int = 4,
    skip_unreadable: bool = False,
) -> SplitMatches:
    """Ask the model of an engine, with what PEFT layers it has, for the matcher's categories, and match what it finds.

    Args:
        encode: Maps records to the features of their images.
        lowest_score: Detections down to it are kept, or down to the lowest threshold.
        skip_unreadable: Leave out images that cannot be read.

    Raises:
        ImageError: An image cannot be read.
    """
    parts: list[SplitMatches] = []
    image_ids: list[int] = []
    categories, post = matcher.categories, matcher.post
    prompts = tuple(category.prompt for category in categories)
    lowest_score = min(lowest_score, post.lowest_threshold)
    for start in range(0, len(index), batch_size):
        records = [index.record(row) for row in range(start, min(start + batch_size, len(index)))]
        if skip_unreadable:
            records, features = _encode_readable(records, encode)
        else:
            features = encode(records).split()
        images = [
            PreparedImage(str(row), _NO_PIXELS, (record["height"], record["width"]), of_image)
            for row, (record, of_image) in enumerate(zip(records, features, strict=True), start)
        ]
        found = engine.detect([PromptedImage(image, prompts, post=post, lowest_score=lowest_score) for image in images])
        parts.append(matcher.match(records, SplitResults.collect(records, categories, found)))
        image_ids += [record["image_id"] for record in records]
    return SplitMatches.join(parts, image_ids, len(categories))


def _encode_readable(
    records: list[dict[str, Any]], encode: Callable[[Sequence[Mapping[str, Any]]], VisionFeatures]
) -> tuple[list[dict[str, Any]], list[VisionFeatures]]:
    """The records whose images can be read, with their features."""
    try:
        return records, encode(records).split()
    except ImageError:
        if len(records) == 1:
            return [], []
    one_by_one = [_encode_readable([record], encode) for record in records]
    return [one for readable, _ in one_by_one for one in readable], [one for _, found in one_by_one for one in found]
