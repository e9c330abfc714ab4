"""The forward pass of SAM 3 in stages, which training, evaluation and serving combine.

The stock ``Sam3Model.forward`` runs one vision pass per (image, prompt) pair and returns the last decoder layer and
every mask. Here the vision tower runs once per image and the text tower once per distinct prompt. The detector runs per
find query and returns all decoder layers, on demand with the one-to-many branch of DAC-DETR
(https://arxiv.org/abs/2310.18461); masks are computed for chosen object queries only. With one prompt per image and all
masks the numbers are those of ``Sam3Model.forward``.

Shapes: ``I`` images, ``P`` distinct prompts, ``B`` find queries (image, prompt), ``Q`` object queries, ``L`` decoder
layers, ``T`` prompt tokens, ``S`` image tokens, ``C`` channels, ``M`` selected (find query, object query) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Sam3Model

from sam3lora.model.adapter.lora_products import adapters_cast_once, lowered
from sam3lora.model.checkpointing import recomputed
from sam3lora.model.staged.attention import attend
from sam3lora.model.staged.box_encoding import BoxEncoding
from sam3lora.model.staged.mask_head import MaskHead
from sam3lora.model.staged.stage_outputs import DetectorOutput, TextFeatures, VisionFeatures, rows_of
from sam3lora.model.staged.trunk import first_layers, frozen_layers, last_layers

__all__ = ["DetectorOutput", "MaskHead", "StagedSam3", "TextFeatures", "VisionFeatures", "rows_of"]


class StagedSam3:
    """Drives the sub-modules of a ``Sam3Model`` (plain, or with PEFT layers injected) in stages.

    Args:
        model: The model itself, not the ``PeftModel`` around it (``peft_model.get_base_model()``).
        geometry_cls: Append the geometry encoder's CLS token to text-only prompts. The original SAM 3 does so and was
            trained that way; the stock transformers forward leaves the token out unless boxes are given.
        checkpointing: Components whose layers recompute their activations in the backward pass.
    """

    def __init__(self, model: Sam3Model, *, geometry_cls: bool = True, checkpointing: Iterable[str] = ()) -> None:
        self.model = model
        self.geometry_cls = geometry_cls
        self.checkpointing = frozenset(checkpointing)

    def adapters_cast_once(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Around forward and backward of a batch: `adapters_cast_once` of the adapters that a forward would cast."""
        return adapters_cast_once(self.model, dtype)

    runs_to_settle = 1
    """Runs of a batch after which one more takes no other memory."""

    def begin_batch(self) -> None:
        """Before forward and backward of a batch."""

    def forget_graphs(self) -> None:
        """Free what was kept to run again."""

    def give_up_graphs(self) -> bool:
        """Free what was kept to run again and keep nothing more; False if nothing ever is."""
        return False

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values_ICHW: Tensor) -> VisionFeatures:
        """One pass of the vision tower and neck over ``I`` images (I, 3, S, S), normalised to mean 0.5, std 0.5.

        The layers of the tower before the first trainable one keep no activations for the backward pass.
        """
        frozen = frozen_layers(self._trunk) if torch.is_grad_enabled() else 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0):
            tokens_ISC = self.encode_trunk(pixel_values_ICHW, frozen)
        return self.encode_rest(tokens_ISC, frozen)

    def encode_trunk(self, pixel_values_ICHW: Tensor, num_layers: int | None = None) -> Tensor:
        """Tokens (I, S, C) after the first ``num_layers`` layers of the vision tower; None takes all layers."""
        return first_layers(self._trunk, pixel_values_ICHW, self._layers(num_layers))

    def encode_rest(self, tokens_ISC: Tensor, num_layers: int | None = None) -> VisionFeatures:
        """Feature maps of square images from the tokens that `encode_trunk` returned for ``num_layers``."""
        return self.encode_neck(last_layers(self._trunk, tokens_ISC, self._layers(num_layers)))

    def encode_neck(self, trunk_ISC: Tensor) -> VisionFeatures:
        """Feature maps of square images from the tokens after all layers of the vision tower."""
        neck, side = self.model.vision_encoder.neck, math.isqrt(trunk_ISC.shape[1])
        tokens_ICHW = lowered(trunk_ISC.unflatten(1, (side, side)).permute(0, 3, 1, 2))
        maps = [layer(tokens_ICHW) for layer in neck.fpn_layers[:-1]]
        positions = [neck.position_encoding((1, *m.shape[1:]), m.device, m.dtype) for m in maps]
        if not torch.is_inference_mode_enabled():  # transformers keeps them, and training cannot use those made in it
            positions = [one.clone() if one.is_inference() else one for one in positions]
        return VisionFeatures(maps, positions)

    @property
    def _trunk(self) -> Any:
        return self.model.vision_encoder.backbone

    def _layers(self, num_layers: int | None) -> int:
        return len(self._trunk.layers) if num_layers is None else num_layers

    def encode_text(self, input_ids_PT: Tensor, attention_mask_PT: Tensor) -> TextFeatures:
        """One pass of the text tower over ``P`` distinct prompts of (P, 32) token ids."""
        mask_PT = attention_mask_PT.bool()
        mask_P1TT = _causal_mask(mask_PT)
        if self.model.config._attn_implementation != "sdpa":
            mask_P1TT = torch.zeros_like(mask_P1TT, dtype=self.model.dtype).masked_fill_(
                ~mask_P1TT, torch.finfo(self.model.dtype).min
            )
        output = self.model.get_text_features(input_ids=input_ids_PT, attention_mask=mask_P1TT)
        return TextFeatures(output.pooler_output, mask_PT)

    def encode_geometry(
        self, vision: VisionFeatures, boxes_cxcywh_BN4: Tensor, labels_BN: Tensor, image_index_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of box exemplars and the CLS token: (B, N + 1, C) and their mask. Label 1, 0, or -10 for padding."""
        dtype = self.model.geometry_encoder.cls_embed.weight.dtype
        maps_BCHW = vision.maps_ICHW[-1][image_index_B].to(dtype)
        positions = vision.positions_1CHW[-1].to(dtype).expand(len(image_index_B), -1, -1, -1)
        # Box pooling (roi_align) has no bfloat16 kernel and fails under autocast on a CPU. These tokens are few.
        with torch.autocast(maps_BCHW.device.type, enabled=False):
            output = self._run(
                "geometry_encoder",
                self.model.geometry_encoder,
                boxes_cxcywh_BN4.to(dtype),
                labels_BN != -10,
                labels_BN.clamp(min=0),
                [maps_BCHW],
                [positions],
            )
        return output.last_hidden_state, output.attention_mask

    def geometry_cls_tokens(self, vision: VisionFeatures) -> Tensor:
        """The geometry CLS token (I, 1, C) of each image where no boxes are given.

        It depends on the image only, not on the prompt. The result is that of ``geometry_encoder`` without boxes; the
        pooling of boxes is skipped, and no mask value is read.
        """
        geometry = self.model.geometry_encoder
        dtype = geometry.cls_embed.weight.dtype
        tokens_ISC = vision.maps_ICHW[-1].flatten(2).transpose(1, 2).to(dtype)
        positions_1SC = vision.positions_1CHW[-1].flatten(2).transpose(1, 2).to(dtype)
        with torch.autocast(tokens_ISC.device.type, enabled=False):
            return self._run("geometry_encoder", _cls_tokens, geometry, tokens_ISC, positions_1SC)

    # ---- detector -------------------------------------------------------------------------------------------------

    def prepare(self, vision: VisionFeatures) -> VisionFeatures:
        """Add the part of `detect` that is the same for all prompts of an image, so that chunks of prompts share it."""
        cls_I1C = self.geometry_cls_tokens(vision) if self.geometry_cls else None
        return replace(vision, begun_ISC=self.begin_fusion(vision), cls_I1C=cls_I1C)

    def begin_fusion(self, vision: VisionFeatures, image_index: Tensor | None = None) -> Tensor:
        """Tokens (I, S, C) after the first self-attention of the DETR encoder, which does not depend on prompts.

        ``image_index`` chooses images; None takes all.
        """
        coarse_ICHW = vision.maps_ICHW[-1]
        if image_index is not None:
            coarse_ICHW = rows_of(coarse_ICHW, image_index)
        tokens_ISC = coarse_ICHW.flatten(2).transpose(1, 2)
        positions_1SC = vision.positions_1CHW[-1].flatten(2).transpose(1, 2)
        return self._run(
            "detr_encoder", _attend_to_itself, self.model.detr_encoder.layers[0], tokens_ISC, positions_1SC
        )

    def detect(
        self,
        vision: VisionFeatures,
        text: TextFeatures,
        image_index_B: Tensor,
        text_index_B: Tensor,
        *,
        boxes_cxcywh_BN4: Tensor | None = None,
        box_labels_BN: Tensor | None = None,
        one_to_many: bool = False,
    ) -> DetectorOutput:
        """Run the detector, everything between the encoders and the masks, for ``B`` find queries.

        ``image_index_B`` and ``text_index_B`` are the rows of ``vision`` and ``text`` that make up each find query.
        Exemplar boxes are in [0, 1], their labels are 1, 0 or -10 (padding). ``one_to_many`` also runs the duplicated
        object queries that training supervises one-to-many.
        """
        prompt, prompt_mask = text.embeds_PTC[text_index_B], text.mask_PT[text_index_B]
        if boxes_cxcywh_BN4 is not None and boxes_cxcywh_BN4.numel() > 0:
            labels = box_labels_BN
            if labels is None:
                labels = torch.ones(boxes_cxcywh_BN4.shape[:2], dtype=torch.long, device=prompt.device)
            tokens, tokens_mask = self.encode_geometry(vision, boxes_cxcywh_BN4, labels, image_index_B)
            prompt = torch.cat([prompt, tokens.to(prompt.dtype)], 1)
            prompt_mask = torch.cat([prompt_mask, tokens_mask], 1)
        elif self.geometry_cls:
            cls_I1C = self.geometry_cls_tokens(vision) if vision.cls_I1C is None else vision.cls_I1C
            prompt = torch.cat([prompt, rows_of(cls_I1C, image_index_B).to(prompt.dtype)], 1)
            prompt_mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt), 1)], 1)
        return self.detect_prompted(vision, prompt, prompt_mask, image_index_B, one_to_many=one_to_many)

    def detect_prompted(
        self,
        vision: VisionFeatures,
        prompt_BTC: Tensor,
        prompt_mask_BT: Tensor,
        image_index_B: Tensor,
        *,
        begun_BSC: Tensor | None = None,
        one_to_many: bool = False,
    ) -> DetectorOutput:
        """Like `detect`, for prompt tokens (text and geometry) of the caller; their mask is True at real tokens.

        ``begun_BSC`` is the result of `begin_fusion` for the image of each find query, if the caller has it.
        """
        coarse = vision.maps_ICHW[-1]
        size_hw = (coarse.shape[-2], coarse.shape[-1])
        positions_1SC = vision.positions_1CHW[-1].flatten(2).transpose(1, 2)
        if begun_BSC is None:
            begun_ISC = self.begin_fusion(vision) if vision.begun_ISC is None else vision.begun_ISC
            begun_BSC = rows_of(begun_ISC, image_index_B)
        read_BTC = lowered(prompt_BTC)  # by attention layers
        read = (read_BTC, _attention_mask(prompt_mask_BT, read_BTC.dtype))
        memory = self._fuse(begun_BSC, positions_1SC, *read)
        return self._decode(
            memory,
            positions_1SC,
            prompt_BTC,
            prompt_mask_BT,
            read,
            size_hw,
            one_to_many,
            image_index_B=image_index_B,
            vision=vision,
        )

    def _fuse(self, begun_BSC: Tensor, positions_1SC: Tensor, prompt_BTC: Tensor, mask: Tensor) -> Tensor:
        """The DETR encoder after its first self-attention: tokens attend to the prompt and again to each other."""
        first, *others = self.model.detr_encoder.layers
        hidden = self._run("detr_encoder", _attend_to_prompt, first, begun_BSC, prompt_BTC, mask)
        for layer in others:
            hidden = self._run("detr_encoder", _encoder_layer, layer, hidden, positions_1SC, prompt_BTC, mask)
        return hidden

    def _decode(
        self,
        memory_BSC: Tensor,
        positions_1SC: Tensor,
        prompt_BTC: Tensor,
        prompt_mask_BT: Tensor,
        read: tuple[Tensor, Tensor],
        size_hw: tuple[int, int],
        one_to_many: bool,
        **context,
    ) -> DetectorOutput:
        """Run the DETR decoder and return the outputs of every layer.

        The sequence is [presence | one-to-one queries | one-to-many queries]. The one-to-many queries have the same
        embeddings as the one-to-one queries. They take no part in self-attention, so the one-to-one outputs do not
        change.
        """
        decoder = self.model.detr_decoder
        num_queries = decoder.query_embed.num_embeddings
        copies = 2 if one_to_many else 1
        batch, num_objects = len(memory_BSC), copies * num_queries
        queries = torch.cat([decoder.presence_token.weight, *[decoder.query_embed.weight] * copies])
        hidden = queries.unsqueeze(0).expand(batch, -1, -1)
        references = decoder.reference_points.weight.float().sigmoid().repeat(copies, 1)
        references = references.unsqueeze(0).expand(batch, -1, -1)
        shared = (
            *read,
            lowered(memory_BSC + positions_1SC),
            lowered(memory_BSC),
            BoxEncoding(decoder, references, size_hw),
            1 + num_queries,
        )
        states, presence_states, offsets, all_references = [], [], [], [references]
        for number, layer in enumerate(decoder.layers):
            hidden = self._run("detr_decoder", self._decoder_layer, layer, hidden, references, *shared)
            presence_B1C, objects_BQC = hidden.split([1, num_objects], dim=1)
            normed = decoder.output_layer_norm(objects_BQC)
            # Boxes stay in float32: bfloat16 would be off by several pixels at 1008.
            with torch.autocast(hidden.device.type, enabled=False):
                offsets.append(decoder.box_head(normed.to(decoder.box_head.layer1.weight.dtype)).float())
            states.append(normed)
            presence_states.append(presence_B1C)
            if number + 1 < len(decoder.layers):  # the queries of the next layer see its boxes without gradient
                with torch.no_grad():
                    references = (_inverse_sigmoid(references) + offsets[-1]).sigmoid()
                all_references.append(references)

        states_LBQC = torch.stack(states)
        presence_BLC = decoder.presence_layer_norm(torch.cat(presence_states, dim=1))  # rows first, for adapters by row
        presence_LB = decoder.presence_head(presence_BLC).squeeze(-1).transpose(0, 1)
        limit = decoder.clamp_presence_logit_max_val
        scores = self._run("scoring", self.model.dot_product_scoring, states_LBQC, prompt_BTC, prompt_mask_BT)
        boxes_LBQ4 = _refined(torch.stack(all_references), torch.stack(offsets))
        logits, boxes, hidden_BQC = (
            dict(zip(("o2o", "o2m"), values.split(num_queries, dim=dim), strict=False))
            for values, dim in ((scores.squeeze(-1), 2), (boxes_LBQ4, 2), (states_LBQC[-1], 1))
        )
        return DetectorOutput(
            logits_LBQ=logits["o2o"],
            boxes_cxcywh_LBQ4=boxes["o2o"],
            presence_logits_LB=presence_LB.clamp(-limit, limit),
            raw_presence_logits_LB=presence_LB,
            logits_o2m_LBQ=logits.get("o2m"),
            boxes_o2m_LBQ4=boxes.get("o2m"),
            hidden_BQC=hidden_BQC,
            encoder_hidden_BSC=memory_BSC,
            prompt_BTC=prompt_BTC,
            prompt_mask_BT=prompt_mask_BT,
            **context,
        )

    def _decoder_layer(
        self,
        layer: Any,
        hidden: Tensor,
        references: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        keys: Tensor,
        memory: Tensor,
        encoding: BoxEncoding,
        num_self_attended: int,
    ) -> Tensor:
        query_pos, bias = encoding.query_positions(references), encoding.attention_bias(references)
        if not torch.is_autocast_enabled(bias.device.type):  # autocast would cast for the attention itself
            bias = bias.to(hidden.dtype)

        attending, bypassing = hidden.split([num_self_attended, hidden.shape[1] - num_self_attended], dim=1)
        with_pos = attending + query_pos[:, :num_self_attended]
        attended = attend(layer.self_attn, with_pos, with_pos, attending)
        hidden = torch.cat([attending + layer.self_attn_dropout(attended), bypassing], 1)
        hidden = layer.self_attn_layer_norm(hidden)

        attended = attend(layer.text_cross_attn, hidden + query_pos, prompt, prompt, prompt_mask)
        hidden = layer.text_cross_attn_layer_norm(hidden + layer.text_cross_attn_dropout(attended))

        attended = attend(layer.vision_cross_attn, hidden + query_pos, keys, memory, bias)
        hidden = layer.vision_cross_attn_layer_norm(hidden + layer.vision_cross_attn_dropout(attended))
        return layer.mlp_layer_norm(hidden + layer.mlp_dropout(layer.mlp(hidden)))

    # ---- masks ----------------------------------------------------------------------------------------------------

    def mask_head(self, detections: DetectorOutput, rows_K: Tensor) -> MaskHead:
        """Pixel embeddings of the ``K`` find queries that need masks, once for all their object queries.

        ``rows_K`` (int64) is best on the CPU: then the host does not wait for the device.
        """
        rows_K = rows_K.cpu()
        rows = rows_K.to(detections.prompt_BTC.device, non_blocking=True)
        memory, prompt = detections.encoder_hidden_BSC[rows], detections.prompt_BTC[rows]
        image_index_B = detections.image_index_B  # on the CPU for some callers
        maps = detections.vision.select(image_index_B[rows_K.to(image_index_B.device, non_blocking=True)])
        pixels_KCHW = self.embed_pixels(memory, prompt, detections.prompt_mask_BT[rows], maps)
        return MaskHead(self.model, detections, rows_K, pixels_KCHW)

    def embed_pixels(
        self, memory_KSC: Tensor, prompt_KTC: Tensor, prompt_mask_KT: Tensor, maps_KCHW: list[Tensor]
    ) -> Tensor:
        """Pixel embeddings (K, C, h, w) from the detector's memory and the maps of each find query's image."""
        decoder = self.model.mask_decoder
        normed = decoder.prompt_cross_attn_norm(memory_KSC)
        prompt_KTC = lowered(prompt_KTC)
        mask = _attention_mask(prompt_mask_KT, prompt_KTC.dtype)
        attended = attend(decoder.prompt_cross_attn, normed, prompt_KTC, prompt_KTC, mask)
        memory_KSC = memory_KSC + decoder.prompt_cross_attn_dropout(attended)
        *fine, coarse = maps_KCHW
        coarse = memory_KSC.transpose(1, 2).reshape(coarse.shape)
        return self._run("mask_decoder", decoder.pixel_decoder, [*fine, coarse])

    # ---- gradient checkpointing -----------------------------------------------------------------------------------

    def _run(self, component: str, function: Callable, *arguments):
        if component in self.checkpointing and torch.is_grad_enabled():
            return recomputed(function, *arguments)
        return function(*arguments)


def _causal_mask(mask_PT: Tensor) -> Tensor:
    """Which tokens a token of a text reads (P, 1, T, T): those before it and itself, without padding.

    transformers takes it as it is. Its own function tests whether all tokens are real, for which the host has to wait
    for the GPU.
    """
    length = mask_PT.shape[1]
    return mask_PT[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=mask_PT.device).tril()


def _cls_tokens(geometry: Any, tokens_ISC: Tensor, positions_1SC: Tensor) -> Tensor:
    embed_I1C = geometry.cls_embed.weight.expand(len(tokens_ISC), 1, -1)
    hidden = geometry.prompt_layer_norm(geometry.final_proj(embed_I1C))
    for layer in geometry.layers:
        hidden = layer(
            prompt_feats=hidden, vision_feats=tokens_ISC, vision_pos_encoding=positions_1SC, prompt_mask=None
        )
    return geometry.output_layer_norm(hidden)


def _encoder_layer(layer: Any, hidden: Tensor, positions: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
    """A DETR encoder layer."""
    return _attend_to_prompt(layer, _attend_to_itself(layer, hidden, positions), prompt, mask)


def _attend_to_itself(layer: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """The first part of a DETR encoder layer: self-attention."""
    normed = layer.layer_norm1(tokens)
    with_positions = normed + positions
    return tokens + layer.dropout(attend(layer.self_attn, with_positions, with_positions, normed))


def _attend_to_prompt(layer: Any, hidden: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
    """The rest of a DETR encoder layer: cross-attention to the prompt, and the MLP."""
    attended = attend(layer.cross_attn, layer.layer_norm2(hidden), prompt, prompt, mask)
    hidden = hidden + layer.dropout(attended)
    return hidden + layer.dropout(layer.mlp(layer.layer_norm3(hidden)))


def _attention_mask(prompt_mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores (B, 1, 1, T) to hide padding tokens, made once and without reading a value.

    transformers' own function tests whether all tokens are real, for which the host has to wait for the GPU.
    """
    padding_B11T = ~prompt_mask_BT.bool()[:, None, None]
    return torch.zeros_like(padding_B11T, dtype=dtype).masked_fill_(padding_B11T, torch.finfo(dtype).min)


def _inverse_sigmoid(values: Tensor, limit: float = 1e-3) -> Tensor:
    """As the stock decoder's, for values that are in [0, 1]."""
    return torch.log(values.clamp(min=limit) / (1 - values).clamp(min=limit))


def _refined(references_LBQ4: Tensor, offsets_LBQ4: Tensor) -> Tensor:
    """Boxes (L, B, Q, 4) of every decoder layer.

    ``references_LBQ4`` are the boxes that a layer's queries saw, detached. As in the stock decoder, a layer's boxes are
    refined from those of the layer before with gradient, that is, with the gradient of that layer's offsets.
    """
    refined = (_inverse_sigmoid(references_LBQ4[:-1]) + offsets_LBQ4[:-1]).sigmoid()
    return (_inverse_sigmoid(torch.cat([references_LBQ4[:1], refined])) + offsets_LBQ4).sigmoid()
