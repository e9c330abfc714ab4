"""One worker of the evaluation of clicks: it clicks on the labelled objects of the images that it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.engine.clicks.answers import MAX_OBJECTS
from sam3lora.engine.clicks.decoder import ClickedObject
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.engine.clicks.prompt import ClickAnswer, ClickPrompt
from sam3lora.engine.engine import Engine, PromptedImage
from sam3lora.engine.feature_cache import PreparedImage
from sam3lora.engine.mask_codes import Rle
from sam3lora.engine.selection import SmallDetections
from sam3lora.evaluation.ask.reading import Asked, read_images
from sam3lora.evaluation.ask.worker import Models, adapter_of, facts_of
from sam3lora.evaluation.clicks.asking import ImageInteractions
from sam3lora.evaluation.clicks.seeds import FoundObject, found_objects
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.evaluation.clicks.simulated_user import SimulatedUser, run_objects
from sam3lora.evaluation.clicks.split_clicks import ClickedFacts, SplitClicks
from sam3lora.evaluation.clicks.true_objects import TrueObject, TrueObjects, true_objects
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory

Place = tuple[Engine, int | None]
"""An engine, and the slot of an adapter there; None is its base."""


class ClickWorker:
    """Loads one model, then clicks on one image after the other.

    Args:
        models: One adapter, or the base.
        categories: Whose objects are clicked on, with their prompts.
        click_adapter: Folder of task clicks, for the click head; None leaves it as it is in the base.

    Raises:
        UserError: The base has no tracker, or a model cannot be loaded.
    """

    def __init__(
        self,
        models: Models,
        categories: Sequence[PromptedCategory],
        settings: ClickEvaluation,
        click_adapter: str | None = None,
    ) -> None:
        (label,) = models.labels
        self._categories, self._settings = categories, settings
        pool = AdapterPool(
            adapters=models.adapters,
            click_adapter=click_adapter,
            max_rows=settings.prompting.max_prompts_per_forward,
            **models.options,
        )
        self._pool = pool
        self._finding: Place = pool.place(adapter_of(label))
        self._clicking = pool.place_clicks(adapter_of(label), settings.clicks_vision)
        self._post = settings.prompting.post_processing(pool.recorded(adapter_of(label)))
        for engine in {self._finding[0], self._clicking.engine}:
            engine.enable_clicks()

    def facts(self) -> dict[str, Any]:
        """The facts that the numbers depend on beside the settings."""
        return {
            **facts_of(self._pool.engine),
            "tracker_fingerprint": self._clicking.engine.tracker_fingerprint[:12],
            **({} if self._settings.start_from is None else self._post.model_dump(mode="json")),
        }

    def ask(self, records: Sequence[Mapping[str, Any]]) -> Asked:
        """Click on all objects of the images of records: `SplitClicks`. Raises ImageError as `read_images`."""
        done = SplitClicks.empty(self._settings.max_clicks)
        truths = {record["image_id"]: true_objects(record, self._categories) for record in records}
        # Images without an object are not read, and pass no tower.
        chosen, images, skipped = read_images(
            [record for record in records if truths[record["image_id"]].objects],
            self._settings.prompting.on_bad_image,
            self._prepare,
        )
        for one in skipped:
            del truths[one.image_id]
        done.counts["images"] = len(truths)
        for image_id, truth in truths.items():
            done.counts.update(without_mask=truth.num_without_mask, crowds=truth.num_crowds)
            for number in truth.too_small:
                done.alone.leave_out(image_id=image_id, object_id=number)
        if chosen:
            clicked, asked = self._encode(images)
            chosen_truths = [truths[record["image_id"]] for record in chosen]
            detections = self._detect(asked, chosen_truths)
            for record, truth, image, of_image in zip(chosen, chosen_truths, clicked, detections, strict=True):
                self._click(done, record["image_id"], truth, image, of_image)
        return Asked(done, skipped)

    def _prepare(self, record: Mapping[str, Any], pixels_HW3: np.ndarray) -> PreparedImage:
        """Before the next image is read: at its own size, one may have 100 megapixels."""
        return self._clicking.engine.prepare_image(pixels_HW3, str(record["image_id"]))

    def _encode(self, images: Sequence[PreparedImage]) -> tuple[list[PreparedImage], list[PreparedImage]]:
        """The images with features to click on and to find objects in, the same if one vision pass makes both."""
        (clicking, slot, _), (finding, finding_slot) = self._clicking, self._finding
        if self._settings.start_from is None:
            return clicking.encode_ahead([(image, slot) for image in images]), list(images)
        if clicking is finding:
            wanted = [(image, slot) for image in images] + [(image, finding_slot) for image in images]
            encoded = clicking.encode_ahead(wanted)
            return encoded[: len(images)], encoded[len(images) :]
        return (
            clicking.encode_ahead([(image, slot) for image in images]),
            finding.encode_ahead([(image, finding_slot) for image in images]),
        )

    def _detect(
        self, images: Sequence[PreparedImage], truths: Sequence[TrueObjects]
    ) -> list[dict[str, SmallDetections]]:
        """For each image, prompt of an object -> what it found."""
        if self._settings.start_from is None:
            return [{} for _ in images]
        engine, slot = self._finding
        prompts = [tuple(dict.fromkeys(one.category.prompt for one in truth.objects)) for truth in truths]
        asked = [
            PromptedImage(image, of_image, slot=slot, post=self._post)
            for image, of_image in zip(images, prompts, strict=True)
        ]
        found = []
        for of_image, detections in zip(prompts, engine.detect_small(asked), strict=True):
            if isinstance(detections, Exception):
                raise detections
            found.append(dict(zip(of_image, detections, strict=True)))
        return found

    def _click(
        self,
        done: SplitClicks,
        image_id: int,
        truth: TrueObjects,
        image: PreparedImage,
        detections: Mapping[str, SmallDetections],
    ) -> None:
        kind = self._settings.start_from
        found: Sequence[FoundObject | None] = [None] * len(truth.objects)
        if kind is not None:
            found = found_objects(truth.objects, detections, kind)
        # As many as the head decodes together, so that no more logits and codes are in memory.
        objects = list(zip(truth.objects, found, strict=True))
        for start in range(0, len(objects), MAX_OBJECTS):
            self._click_together(done, image_id, objects[start : start + MAX_OBJECTS], truth.ignored, image)

    def _click_together(
        self,
        done: SplitClicks,
        image_id: int,
        objects: Sequence[tuple[TrueObject, FoundObject | None]],
        ignored: Rle | None,
        image: PreparedImage,
    ) -> None:
        """Click on objects from nothing, and on those that were found from there too, all in step."""
        engine, slot, click_slot = self._clicking

        def ask(prompts: Sequence[ClickPrompt]) -> Sequence[ClickAnswer | Exception]:
            return engine.click([ClickedObject(image, one, slot, click_slot=click_slot) for one in prompts])

        nothing = Interaction(image.size_hw, engine.resolution)
        users = [SimulatedUser(one.rle, ignored, None, self._settings.max_clicks) for one, _ in objects]
        starts = [nothing] * len(objects)
        for one, start in objects:
            if start is not None:
                users.append(SimulatedUser(one.rle, ignored, start.rle, self._settings.max_clicks))
                starts.append(replace(nothing, seed=start.seed))
        interactions = ImageInteractions(ask, starts, self._settings.cleaning)
        runs = run_objects(users, interactions.answer)
        runs_from_text = iter(runs[len(objects) :])
        for (one, start), run, shown in zip(objects, runs, interactions.shown, strict=False):
            done.alone.add(run, image_id=image_id, object_id=one.number)
            if self._settings.start_from is not None:
                from_text = run if start is None else next(runs_from_text)
                done.from_text.add(from_text, image_id=image_id, object_id=one.number)
            done.facts[image_id, one.number] = ClickedFacts(one.category.name, start is not None, shown)
