"""The detector and the mask head as stages: from features of images and prompts to answers and mask logits.

Shapes: ``B`` rows (find queries), ``U`` distinct pairs of image and adapter, ``K`` rows of one image with masks, ``Q``
object queries, ``T`` prompt tokens, ``S`` image tokens, ``C`` channels, ``M`` selected (row, object query) pairs, ``h``
``w`` size of the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sam3lora.engine.graphs.stage import Stage, StaticTensors
from sam3lora.engine.selection import pack_answers
from sam3lora.engine.transfers import upload
from sam3lora.model.staged.forward import StagedSam3, TextFeatures, VisionFeatures

MAX_SHOWN = 7
"""Tokens of boxes in a row, with their CLS token: with those of a text and its CLS token there are 40."""

MAX_MASK_ROWS = 8
"""Rows that pass the mask head together: at 1008 pixels each takes some 150 MB there."""


class ImagePartStage:
    """What the detector computes for an image before any prompt: first self-attention and the geometry CLS token."""

    def __init__(self, staged: StagedSam3, stage: Callable[..., Stage], capacity: int) -> None:
        self._staged = staged
        self.tensors = StaticTensors(capacity)
        self._position_1CHW: Tensor | None = None
        components = ("detr_encoder", "geometry_encoder")
        self.stage = stage("begin", self._begin, components=components, fields=1, capacity=capacity)

    def run(self, vision_U: Sequence[VisionFeatures], slots_U: Sequence[int | None]) -> None:
        """Afterwards `tensors` hold the tokens "begun" (U, S, C) and "cls" (U, 1, C)."""
        if self._position_1CHW is None:  # the same for all images
            self._position_1CHW = vision_U[0].positions_1CHW[-1].clone()
        coarse = [one.maps_ICHW[-1] for one in vision_U]
        target = self.tensors.like("coarse", coarse[0])
        torch.cat(coarse, out=target[: len(coarse)])
        self.stage.run(slots_U, [()] * len(slots_U))

    def vision(self, size: int) -> VisionFeatures:
        """The coarse maps of the first images, all that the detector reads."""
        assert self._position_1CHW is not None
        return VisionFeatures([self.tensors["coarse"][:size]], [self._position_1CHW])

    def _begin(self, size: int) -> None:
        vision = self.vision(size)
        self.tensors.keep("begun", self._staged.begin_fusion(vision))
        self.tensors.keep("cls", self._staged.geometry_cls_tokens(vision))


class DetectorStage:
    """The rest of the detector for rows that differ in image, prompt and adapter.

    The prompt of a row is [text | geometry CLS token | tokens of boxes], each part with its own mask.
    """

    _FIELDS = 4
    """Slot, place of the image's part, whether the CLS token follows the text, number of tokens of boxes."""

    def __init__(self, staged: StagedSam3, stage: Callable[..., Stage], images: ImagePartStage, capacity: int) -> None:
        self._staged = staged
        self.images = images
        self.tensors = StaticTensors(capacity)
        components = ("detr_encoder", "detr_decoder", "scoring")
        self.stage = stage("detect", self._detect, components=components, fields=self._FIELDS, capacity=capacity)

    def run(
        self,
        text_B: Sequence[TextFeatures],
        slots_B: Sequence[int | None],
        image_B: Sequence[int],
        has_cls_B: Sequence[bool],
        shown_BTC: Mapping[int, Tensor],
    ) -> Tensor:
        """Answers (B, Q, 6) of `pack_answers` on the device.

        `image_B` are places among the image's parts that were computed last; `shown_BTC` are the tokens of boxes
        (T, C) by row.
        """
        num_rows = len(text_B)
        text = self.tensors.like("text", text_B[0].embeds_PTC)
        torch.cat([one.embeds_PTC for one in text_B], out=text[:num_rows])
        mask = self.tensors.like("text mask", text_B[0].mask_PT)
        torch.cat([one.mask_PT for one in text_B], out=mask[:num_rows])
        shown = self.tensors.like("shown", text[:1, :1].expand(-1, MAX_SHOWN, -1))
        for row, tokens_TC in shown_BTC.items():
            shown[row, : len(tokens_TC)].copy_(tokens_TC)
        num_shown_B = [len(shown_BTC.get(row, ())) for row in range(num_rows)]
        controls = [
            (image, int(has_cls), num) for image, has_cls, num in zip(image_B, has_cls_B, num_shown_B, strict=True)
        ]
        self.stage.run(slots_B, controls)
        return self.tensors["answers"][:num_rows]

    def _detect(self, size: int) -> None:
        image_B, has_cls_B, num_shown_B = self.stage.controls_BF[:size, 1:].unbind(1)
        parts, rows = self.images.tensors, self.tensors
        text_BTC, shown_BTC = rows["text"][:size], rows["shown"][:size]
        cls_B1C = parts["cls"].index_select(0, image_B).to(text_BTC.dtype)
        prompt_BTC = torch.cat([text_BTC, cls_B1C, shown_BTC], 1)
        place_T = torch.arange(MAX_SHOWN, device=image_B.device)
        mask_BT = torch.cat([rows["text mask"][:size], has_cls_B[:, None] > 0, place_T < num_shown_B[:, None]], 1)
        # What an earlier batch left in hidden tokens may be NaN, which attention would not hide.
        prompt_BTC = prompt_BTC.masked_fill(~mask_BT[..., None], 0)
        output = self._staged.detect_prompted(
            self.images.vision(1), prompt_BTC, mask_BT, image_B, begun_BSC=parts["begun"].index_select(0, image_B)
        )
        rows.keep("answers", pack_answers(output))
        rows.keep("memory", output.encoder_hidden_BSC)
        rows.keep("hidden", output.hidden_BQC["o2o"])
        rows.keep("prompt", prompt_BTC)
        rows.keep("mask", mask_BT)


class MaskStage:
    """The mask head for rows of one image: logits of all object queries, from which the selected ones are taken.

    All of them take less memory than the pixel embeddings that they are products of.
    """

    _FIELDS = 2
    """Slot, row of the detector and of the logits."""

    def __init__(self, staged: StagedSam3, stage: Callable[..., Stage], detector: DetectorStage, capacity: int) -> None:
        self._staged = staged
        self._detector = detector
        self._maps = StaticTensors(1)
        self._num_fine = 0
        self._logits = StaticTensors(capacity)
        components = ("mask_decoder",)
        self.stage = stage("masks", self._embed, components=components, fields=self._FIELDS, capacity=MAX_MASK_ROWS)

    def run(self, rows_K: Sequence[int], vision: VisionFeatures, slots_K: Sequence[int | None]) -> None:
        """Compute the logits of rows of the detector's last run that ask about one image."""
        for level, fine_1CHW in enumerate(vision.maps_ICHW[:-1]):
            self._maps.keep(f"map {level}", fine_1CHW)
        self._num_fine = len(vision.maps_ICHW) - 1
        for start in range(0, len(rows_K), MAX_MASK_ROWS):
            part = rows_K[start : start + MAX_MASK_ROWS]
            self.stage.run(slots_K[start : start + MAX_MASK_ROWS], [(row,) for row in part])

    def logits(self, row_M: Tensor, query_M: Tensor) -> Tensor:
        """Mask logits (M, h, w) of rows for which `run` was called; indices are on the host."""
        logits_BQHW = self._logits["logits"]
        index_M = row_M * logits_BQHW.shape[1] + query_M
        return logits_BQHW.flatten(0, 1).index_select(0, upload(index_M, logits_BQHW.device))

    def _embed(self, size: int) -> None:
        row_K = self.stage.controls_BF[:size, 1]
        memory, hidden, prompt, mask = (
            self._detector.tensors[name].index_select(0, row_K) for name in ("memory", "hidden", "prompt", "mask")
        )
        maps = [self._maps[f"map {level}"] for level in range(self._num_fine)]
        maps += self._detector.images.vision(1).maps_ICHW  # of which only the size counts
        maps_KCHW = [one.expand(size, -1, -1, -1) for one in maps]
        pixels_KCHW = self._staged.embed_pixels(memory, prompt, mask, maps_KCHW)
        decoder = self._staged.model.mask_decoder
        instance_KCHW = decoder.instance_projection(pixels_KCHW)
        logits_KQHW = (decoder.mask_embedder(hidden) @ instance_KCHW.flatten(2)).unflatten(2, instance_KCHW.shape[2:])
        self._logits.like("logits", logits_KQHW).index_copy_(0, row_K, logits_KQHW)
