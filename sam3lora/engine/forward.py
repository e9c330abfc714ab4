"""One forward of rows that differ in image, prompt, boxes and adapter.

Shapes: ``I`` images, ``P`` prompts, ``B`` rows (find queries), ``K`` rows with masks, ``N`` boxes, ``T`` prompt tokens,
``U`` distinct (image, adapter) pairs or geometry prompts, ``S`` image tokens, ``C`` channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sam3lora.engine.clicks.features import ClickableFeatures
from sam3lora.engine.selection import MaskLogits, SmallDetections, Wanted, select_detections
from sam3lora.engine.transfers import upload
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.lora_products import lowered
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures, rows_of
from sam3lora.model.staged.stage_outputs import DetectorOutput
from sam3lora.model.staged.trunk import first_layers, layer_outputs

PADDING_LABEL = -10
"""Of a box that only fills up a row of boxes."""

RelativeBox = tuple[tuple[float, float, float, float], int]
"""Centre x, centre y, width and height in [0, 1], and label 1 or 0."""


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt of one image.

    Its features (I = 1, P = 1) are made under the row's adapter, or shared if that leaves the tower as it is.
    `geometry_cls` is whether the geometry CLS token follows the text if there are no boxes; with boxes it always does.
    """

    vision: VisionFeatures = field(repr=False)
    text: TextFeatures = field(repr=False)
    wanted: Wanted
    slot: int | None = None
    boxes: tuple[RelativeBox, ...] = ()
    geometry_cls: bool = True


class FeaturesOfImages(VisionFeatures):
    """Features of single images seen as one batch: the fine maps, which only masks need, are not copied before."""

    def __init__(self, features: Sequence[VisionFeatures]) -> None:
        super().__init__([torch.cat([one.maps_ICHW[-1] for one in features])], features[0].positions_1CHW)
        self._features = features

    def select(self, image_index_B: Tensor) -> list[Tensor]:
        chosen = [self._features[index] for index in image_index_B.tolist()]
        levels = range(len(chosen[0].maps_ICHW))
        if all(one is chosen[0] for one in chosen):
            return [chosen[0].maps_ICHW[level].expand(len(chosen), -1, -1, -1) for level in levels]
        return [torch.cat([one.maps_ICHW[level] for one in chosen]) for level in levels]


class Forward(Protocol):
    """Runs a base model, and the adapters over it, on batches in which every row has an adapter of its own."""

    def encode_images(self, pixel_values_ICHW: Tensor, slots_I: Sequence[int | None]) -> list[VisionFeatures]:
        """Features of each image (I = 1), in memory of their own."""
        ...

    def encode_text(
        self, input_ids_PT: Tensor, attention_mask_PT: Tensor, slots_P: Sequence[int | None]
    ) -> list[TextFeatures]:
        """Features of each prompt (P = 1), in memory of their own. Ids and mask may be on the host."""
        ...

    def detect(self, rows: Sequence[Row], max_rows: int) -> Iterator[SmallDetections]:
        """The detections of each row, as if it were alone, in their order; rows of one image best stand together."""
        ...

    def warm_up_sizes(self, most: int) -> list[int]:
        """Numbers of rows, or of images, up to `most` to run once before they are needed, the most important first."""
        ...

    def keep_trunk(self) -> None:
        """From now on `encode_images` gives `ClickableFeatures`."""
        ...

    def free_memory(self) -> None:
        """Free what is kept for later calls."""
        ...


class MixedForward:
    """A base model and the adapters over it, run on batches in which every row has an adapter of its own.

    `compile_vision` runs the vision encoder through ``torch.compile`` while no adapter changes it.
    """

    def __init__(self, staged: StagedSam3, bank: AdapterBank, *, compile_vision: bool = False) -> None:
        self._staged = staged
        self._bank = bank
        encoder = staged.model.vision_encoder
        self._compiled_vision = torch.compile(encoder) if compile_vision else None
        self._positions_1CHW: list[Tensor] = []
        self.keeps_trunk = False

    def keep_trunk(self) -> None:
        self.keeps_trunk = True

    def encode_images(self, pixel_values_ICHW: Tensor, slots_I: Sequence[int | None]) -> list[VisionFeatures]:
        """Features of each image (I = 1), in memory of their own."""
        with self._rows(slots_I):
            together, trunk_ISC = self.run_vision(pixel_values_ICHW)
        return self._split(together, len(slots_I), trunk_ISC)

    def run_vision(self, pixel_values_ICHW: Tensor) -> tuple[VisionFeatures, Tensor | None]:
        """Features of images under the adapters of the present block, and the trunk's tokens (I, S, C) if kept."""
        if (compiled := self.compiled_vision()) is not None:
            output = compiled(pixel_values_ICHW)
            return VisionFeatures.from_output(output), self._kept_trunk(output.last_hidden_state)
        if not self.keeps_trunk:
            return self._staged.encode_images(pixel_values_ICHW), None
        trunk_ISC = self._staged.encode_trunk(pixel_values_ICHW)
        return self._staged.encode_neck(trunk_ISC), self._kept_trunk(trunk_ISC)

    def _kept_trunk(self, trunk_ISC: Tensor) -> Tensor | None:
        return lowered(trunk_ISC) if self.keeps_trunk else None

    def encode_layers(
        self,
        pixel_values_ICHW: Tensor,
        slots_I: Sequence[int | None],
        layers: Collection[int],
        with_features: Sequence[int] = (),
    ) -> tuple[dict[int, Tensor], list[VisionFeatures]]:
        """Tokens (I, S, C) after layers of the trunk, by layer, and the features of some of the images (I = 1)."""
        trunk = self._staged.model.vision_encoder.backbone
        last = len(trunk.layers) - 1
        numbers = sorted({*layers, *([last] if with_features else [])})
        with self._rows(slots_I):
            outputs = layer_outputs(trunk, first_layers(trunk, pixel_values_ICHW, 0), numbers)
        tokens = dict(zip(numbers, outputs, strict=True))
        if not with_features:
            return tokens, []
        with self._rows([slots_I[index] for index in with_features]):
            trunk_ISC = tokens[last][list(with_features)]
            together = self._staged.encode_neck(trunk_ISC)
        return tokens, self._split(together, len(with_features), self._kept_trunk(trunk_ISC))

    def _split(self, together: VisionFeatures, num: int, trunk_ISC: Tensor | None) -> list[VisionFeatures]:
        if not self._positions_1CHW:  # the same for all images
            self._positions_1CHW = [position.clone() for position in together.positions_1CHW]
        maps_I = [[maps[i : i + 1].clone() for maps in together.maps_ICHW] for i in range(num)]
        if trunk_ISC is None:
            return [VisionFeatures(maps, self._positions_1CHW) for maps in maps_I]
        return [
            ClickableFeatures(maps, self._positions_1CHW, trunk_1SC=trunk_1SC.clone())
            for maps, trunk_1SC in zip(maps_I, trunk_ISC.split(1), strict=True)
        ]

    def compiled_vision(self) -> Callable[[Tensor], Any] | None:
        """The compiled vision encoder, while no adapter changes it."""
        return None if self._bank.adapts("vision_encoder") else self._compiled_vision

    def encode_text(
        self, input_ids_PT: Tensor, attention_mask_PT: Tensor, slots_P: Sequence[int | None]
    ) -> list[TextFeatures]:
        """Features of each prompt (P = 1), in memory of their own. Ids and mask may be on the host."""
        device = self._staged.model.text_projection.weight.device
        with self._rows(slots_P):
            together = self._staged.encode_text(upload(input_ids_PT, device), upload(attention_mask_PT, device))
        return [
            TextFeatures(together.embeds_PTC[p : p + 1].clone(), together.mask_PT[p : p + 1].clone())
            for p in range(len(slots_P))
        ]

    def detect(self, rows: Sequence[Row], max_rows: int) -> Iterator[SmallDetections]:
        """The detections of each row, as if it were alone, in their order; rows of one image best stand together."""
        begun: dict[tuple, Tensor] = {}
        for start in range(0, len(rows), max_rows):
            chunk = rows[start : start + max_rows]
            self._begin_fusion(chunk, begun)
            yield from self._detect_together(chunk, begun)

    def warm_up_sizes(self, most: int) -> list[int]:
        return sorted({1, most}) if most else []

    def free_memory(self) -> None:
        pass

    def semantic(self, rows: Sequence[Row], max_rows: int) -> Iterator[Tensor]:
        """Semantic logits (h, w) of each row: whether a pixel belongs to any object of its prompt."""
        begun: dict[tuple, Tensor] = {}
        for start in range(0, len(rows), max_rows):
            chunk = rows[start : start + max_rows]
            self._begin_fusion(chunk, begun)
            output = self._run_detector(chunk, begun)
            every_B = torch.arange(len(chunk))
            with self._rows([row.slot for row in chunk]):
                yield from self._staged.mask_head(output, every_B).semantic_logits(every_B)

    def _run_detector(self, rows: Sequence[Row], begun: dict[tuple, Tensor]) -> DetectorOutput:
        position = {id(row.vision): row.vision for row in rows}
        vision = FeaturesOfImages(list(position.values()))
        order = {identity: index for index, identity in enumerate(position)}
        image_index_B = torch.tensor([order[id(row.vision)] for row in rows])
        prompt_BTC, prompt_mask_BT = self._prompts(rows, vision, image_index_B)
        keys_B = [self._fusion_key(row) for row in rows]
        used = {key: index for index, key in enumerate(dict.fromkeys(keys_B))}
        begun_BSC = rows_of(
            torch.cat([begun[key] for key in used]), torch.tensor([used[key] for key in keys_B]).to(prompt_BTC.device)
        )
        with self._rows([row.slot for row in rows]):
            return self._staged.detect_prompted(vision, prompt_BTC, prompt_mask_BT, image_index_B, begun_BSC=begun_BSC)

    def _detect_together(self, rows: Sequence[Row], begun: dict[tuple, Tensor]) -> Iterator[SmallDetections]:
        slots_B = [row.slot for row in rows]
        output = self._run_detector(rows, begun)

        def mask_head(rows_K: list[int]) -> MaskLogits:
            with self._rows([slots_B[row] for row in rows_K]):
                head = self._staged.mask_head(output, torch.tensor(rows_K))
                head.prepare()
            return head.instance_logits

        return select_detections(output, [row.wanted for row in rows], mask_head)

    def _fusion_key(self, row: Row) -> tuple:
        return id(row.vision), row.slot if "detr_encoder" in self._bank.components(row.slot) else None

    def _begin_fusion(self, rows: Sequence[Row], begun: dict[tuple, Tensor]) -> None:
        """Fill `begun` with the first part of the DETR encoder, which comes before any prompt: (1, S, C) for each image
        and each adapter that changes it. Those of the chunk before stay only if this one needs them too.
        """
        needed = {self._fusion_key(row): row for row in rows}
        for key in begun.keys() - needed.keys():
            del begun[key]
        missing = {key: row for key, row in needed.items() if key not in begun}
        if not missing:
            return
        images = {key[0]: row.vision for key, row in missing.items()}
        order = {identity: index for index, identity in enumerate(images)}
        vision = FeaturesOfImages(list(images.values()))
        with self._rows([slot for _, slot in missing]):
            begun_USC = self._staged.begin_fusion(
                vision, torch.tensor([order[image] for image, _ in missing], device=vision.maps_ICHW[-1].device)
            )
        begun |= zip(missing, begun_USC.split(1), strict=True)

    def _prompts(self, rows: Sequence[Row], vision: VisionFeatures, image_index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of text and geometry (B, T, C) and their mask."""
        prompt_BTC = torch.cat([row.text.embeds_PTC for row in rows])
        prompt_mask_BT = torch.cat([row.text.mask_PT for row in rows])
        has_geometry_B = [row.geometry_cls or bool(row.boxes) for row in rows]
        if not any(has_geometry_B):
            return prompt_BTC, prompt_mask_BT
        tokens_UTC, mask_UT, index_B = self.geometry_tokens(rows, vision, image_index_B)
        mask_BT = mask_UT[index_B]
        if not all(has_geometry_B):
            mask_BT = mask_BT & torch.tensor(has_geometry_B, device=prompt_BTC.device)[:, None]
        tokens_BTC = tokens_UTC.to(prompt_BTC.dtype)[index_B]
        return torch.cat([prompt_BTC, tokens_BTC], 1), torch.cat([prompt_mask_BT, mask_BT], 1)

    def geometry_tokens(
        self, rows: Sequence[Row], vision: VisionFeatures, image_index_B: Tensor
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Tokens of the rows' boxes, then the CLS token (U, T, C), their mask, and for each row its place among them.

        They do not depend on the text: rows with the same image, boxes and adapter share them.
        """
        distinct: dict[tuple, int] = {}
        index_B: list[int] = []
        first_U: list[int] = []
        for b, (row, image) in enumerate(zip(rows, image_index_B.tolist(), strict=True)):
            adapts = "geometry_encoder" in self._bank.components(row.slot)
            key = (image, row.slot if adapts else None, row.boxes)
            if key not in distinct:
                distinct[key] = len(first_U)
                first_U.append(b)
            index_B.append(distinct[key])
        most = max(len(row.boxes) for row in rows)
        boxes_UN4 = torch.full((len(first_U), most, 4), float(PADDING_LABEL))
        labels_UN = torch.full((len(first_U), most), PADDING_LABEL)
        for u, b in enumerate(first_U):
            if boxes := rows[b].boxes:
                boxes_UN4[u, : len(boxes)] = torch.tensor([box for box, _ in boxes])
                labels_UN[u, : len(boxes)] = torch.tensor([label for _, label in boxes])
        device = vision.maps_ICHW[-1].device
        with self._rows([key[1] for key in distinct]):
            tokens_UTC, mask_UT = self._staged.encode_geometry(
                vision, boxes_UN4.to(device), labels_UN.to(device), image_index_B[first_U]
            )
        return tokens_UTC, mask_UT.bool(), index_B

    def _rows(self, slots: Sequence[int | None]) -> AbstractContextManager[None]:
        if all(slot is None for slot in slots):  # outside of `rows` the modules compute what the base does
            return contextlib.nullcontext()
        return self._bank.rows(slots)
