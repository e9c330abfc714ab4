"""The forward of a mixed batch as a handful of stages, each of which is one launch once it is captured.

Shapes: ``B`` rows (find queries), ``K`` rows with masks, ``U`` distinct pairs of image and adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sam3lora.engine.forward import FeaturesOfImages, MixedForward, Row
from sam3lora.engine.graphs.capture import Capturer
from sam3lora.engine.graphs.detector import MAX_SHOWN, DetectorStage, ImagePartStage, MaskStage
from sam3lora.engine.graphs.stage import SIZES, Stage, padded_size
from sam3lora.engine.graphs.towers import MAX_IMAGES, TextStage, VisionStage
from sam3lora.engine.selection import MaskLogits, SmallDetections, select_answers
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures

logger = logging.getLogger(__name__)


class GraphedForward:
    """Gives what `MixedForward` gives, with the launches of a few graphs.

    Numbers differ by rounding, as rows are padded to 1, 2, 4, 8, 16 or 32. Rows with more boxes than the graphs have
    room for go the plain way.

    Args:
        plain: For those rows, and for the tokens of boxes.
        max_images: The most images that pass the vision tower together.
        max_rows: The most rows of `detect` together.

    Memory is kept between calls: at 1008 pixels in bfloat16 some 70 MB for each of `max_images` and 40 MB for each of
    `max_rows`, beside the largest intermediate tensors of a stage.
    """

    def __init__(
        self,
        staged: StagedSam3,
        bank: AdapterBank,
        plain: MixedForward,
        capturer: Capturer,
        *,
        max_images: int,
        max_rows: int,
    ) -> None:
        self._plain = plain
        self._staged = staged
        self._bank = bank
        self._capturer = capturer
        self._max_images = min(max_images, MAX_IMAGES)
        self._max_rows = min(max_rows, SIZES[-1])
        self._build()

    def _build(self) -> None:
        device = next(self._staged.model.parameters()).device
        stage = partial(Stage, bank=self._bank, capturer=self._capturer, device=device)
        capacity = padded_size(self._max_rows)
        self._vision = VisionStage(self._staged, stage, self._plain.run_vision, padded_size(self._max_images))
        self._text = TextStage(self._staged, stage)
        self._images = ImagePartStage(self._staged, stage, capacity)
        self._detector = DetectorStage(self._staged, stage, self._images, capacity)
        self._masks = MaskStage(self._staged, stage, self._detector, capacity)

    @property
    def stages(self) -> list[Stage]:
        return [part.stage for part in (self._vision, self._text, self._images, self._detector, self._masks)]

    def encode_images(self, pixel_values_ICHW: Tensor, slots_I: Sequence[int | None]) -> list[VisionFeatures]:
        return self._vision.encode(pixel_values_ICHW, slots_I)

    def encode_text(
        self, input_ids_PT: Tensor, attention_mask_PT: Tensor, slots_P: Sequence[int | None]
    ) -> list[TextFeatures]:
        return self._text.encode(input_ids_PT, attention_mask_PT, slots_P)

    def detect(self, rows: Sequence[Row], max_rows: int) -> Iterator[SmallDetections]:
        max_rows = min(max_rows, self._max_rows)
        for start in range(0, len(rows), max_rows):
            chunk = rows[start : start + max_rows]
            if max(len(row.boxes) for row in chunk) < MAX_SHOWN:
                yield from self._detect_together(chunk)
            else:
                yield from self._plain.detect(chunk, max_rows)

    def warm_up_sizes(self, most: int) -> list[int]:
        """Each size is captured when it runs for the second time."""
        if not most:
            return []
        sizes = [size for size in SIZES if size <= padded_size(min(most, SIZES[-1]))]
        by_use = sorted(sizes, key=lambda size: (size not in (1, sizes[-1]), -size))
        return [min(size, most) for size in by_use for _ in range(2)]

    def keep_trunk(self) -> None:
        self._plain.keep_trunk()
        self._build()  # captures of before do not keep it

    def free_memory(self) -> None:
        """Drop all graphs and the memory that they work in."""
        self._build()

    def _detect_together(self, rows: Sequence[Row]) -> Iterator[SmallDetections]:
        slots_B = [row.slot for row in rows]
        # Each image, under each adapter that changes what the detector makes of it before any prompt.
        keys_B = [(id(row.vision), self._images.stage.maker(row.slot)) for row in rows]
        vision_U = {key: row.vision for key, row in zip(keys_B, rows, strict=True)}
        place = {key: u for u, key in enumerate(vision_U)}
        self._images.run(list(vision_U.values()), [slot for _, slot in vision_U])
        answers_BQ6 = self._detector.run(
            [row.text for row in rows],
            slots_B,
            [place[key] for key in keys_B],
            [row.geometry_cls and not row.boxes for row in rows],
            self._box_tokens(rows),
        )

        def mask_head(rows_K: list[int]) -> MaskLogits:
            of_image: dict[int, list[int]] = {}
            for row in rows_K:
                of_image.setdefault(id(rows[row].vision), []).append(row)
            for together in of_image.values():
                self._masks.run(together, rows[together[0]].vision, [slots_B[row] for row in together])
            return self._masks.logits

        return select_answers(answers_BQ6, [row.wanted for row in rows], mask_head)

    def _box_tokens(self, rows: Sequence[Row]) -> dict[int, Tensor]:
        """By row with boxes, the tokens (T, C) of its boxes and their CLS token."""
        shown = {b: row for b, row in enumerate(rows) if row.boxes}
        if not shown:
            return {}
        images = list({id(row.vision): row.vision for row in shown.values()}.values())
        index = {id(vision): number for number, vision in enumerate(images)}
        tokens_UTC, _, index_B = self._plain.geometry_tokens(
            list(shown.values()),
            FeaturesOfImages(images),
            torch.tensor([index[id(row.vision)] for row in shown.values()]),
        )
        return {b: tokens_UTC[u, : len(row.boxes) + 1] for (b, row), u in zip(shown.items(), index_B, strict=True)}
