"""SAM 3 in stages: what the stock ``Sam3Model.forward`` does, in pieces that training, evaluation and serving combine.

The stock forward runs one vision pass per (image, prompt) pair and returns the last decoder layer and every mask. Here
the vision tower runs once per image and the text tower once per distinct prompt; the rest runs per find query, returns
all decoder layers, optionally the one-to-many branch of DAC-DETR (https://arxiv.org/abs/2310.18461), and masks of the
wanted object queries only. With one prompt per image and all masks the numbers are those of ``Sam3Model.forward``.

Shapes: ``I`` images, ``P`` distinct prompts, ``B`` find queries (image, prompt), ``Q`` object queries, ``L`` decoder
layers, ``T`` prompt tokens, ``S`` image tokens, ``C`` channels, ``M`` selected (find query, object query) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Sam3Model
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.sam3.modeling_sam3 import inverse_sigmoid

BRANCHES = ("o2o", "o2m")


@dataclass
class VisionFeatures:
    """Feature maps of ``I`` images, finest first, without the coarsest level that SAM 3 discards."""

    maps_ICHW: list[Tensor]
    positions_1CHW: list[Tensor]

    @classmethod
    def from_output(cls, output: Any) -> VisionFeatures:
        """From what ``Sam3Model.vision_encoder`` returns."""
        positions = [position[:1] for position in output.fpn_position_encoding[:-1]]
        return cls(list(output.fpn_hidden_states[:-1]), positions)

    def select(self, image_index_B: Tensor) -> list[Tensor]:
        return [maps.index_select(0, image_index_B) for maps in self.maps_ICHW]

    def detached(self) -> VisionFeatures:
        """The same values as leaves that collect gradients: chunks of prompts can share one vision pass."""
        leaves = [maps.detach().requires_grad_(maps.requires_grad) for maps in self.maps_ICHW]
        return replace(self, maps_ICHW=leaves)


@dataclass
class TextFeatures:
    """Token features of ``P`` prompts; ``mask_PT`` is True at real tokens."""

    embeds_PTC: Tensor
    mask_PT: Tensor

    def detached(self) -> TextFeatures:
        return replace(self, embeds_PTC=self.embeds_PTC.detach().requires_grad_(self.embeds_PTC.requires_grad))


@dataclass
class Detections:
    """What the decoder says about ``B`` find queries, and what the mask branch needs to go on.

    ``boxes_cxcywh_LBQ4`` are float32 in units of the input's sides; ``presence_logits_LB`` and the logits are raw.
    The ``o2m`` fields are None unless the one-to-many branch was asked for.
    """

    logits_LBQ: Tensor
    boxes_cxcywh_LBQ4: Tensor
    presence_logits_LB: Tensor
    logits_o2m_LBQ: Tensor | None
    boxes_o2m_LBQ4: Tensor | None
    hidden_BQC: dict[str, Tensor]
    encoder_hidden_BSC: Tensor
    prompt_BTC: Tensor
    prompt_mask_BT: Tensor
    image_index_B: Tensor
    vision: VisionFeatures

    def scores_BQ(self) -> Tensor:
        """Probability that each object query is an instance of its prompt: sigmoid(logit) x sigmoid(presence)."""
        return self.logits_LBQ[-1].float().sigmoid() * self.presence_logits_LB[-1].float().sigmoid()[:, None]


class StagedSam3:
    """Drives the sub-modules of a ``Sam3Model`` (plain, or with PEFT layers injected) in stages.

    Args:
        model: the model itself, not the ``PeftModel`` around it (``peft_model.get_base_model()``).
        geometry_cls: append the geometry encoder's CLS token to text-only prompts, as the original SAM 3 does and its
            weights were trained; the stock transformers forward leaves it out unless boxes are given.
        checkpointing: components whose layers recompute their activations in the backward pass.
    """

    def __init__(self, model: Sam3Model, *, geometry_cls: bool = True, checkpointing: Iterable[str] = ()) -> None:
        self.model = model
        self.geometry_cls = geometry_cls
        self.checkpointing = frozenset(checkpointing)

    # ---- encoders -------------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values_ICHW: Tensor) -> VisionFeatures:
        """One pass of the vision tower and neck over ``I`` images (I, 3, H, W), normalised to mean 0.5, std 0.5."""
        return VisionFeatures.from_output(self.model.vision_encoder(pixel_values_ICHW))

    def encode_trunk(self, pixel_values_ICHW: Tensor) -> Tensor:
        """The first part of `encode_images`, the vision tower alone: tokens (I, S, C), row by row of the patches."""
        return self.model.vision_encoder.backbone(pixel_values_ICHW).last_hidden_state

    def encode_neck(self, trunk_ISC: Tensor) -> VisionFeatures:
        """The second part of `encode_images`: feature maps of square images from the tokens of `encode_trunk`."""
        side = math.isqrt(trunk_ISC.shape[1])
        tokens_ICHW = trunk_ISC.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        maps, positions = self.model.vision_encoder.neck(tokens_ICHW)
        return VisionFeatures(list(maps[:-1]), [position[:1] for position in positions[:-1]])

    def encode_text(self, input_ids_PT: Tensor, attention_mask_PT: Tensor) -> TextFeatures:
        """One pass of the text tower over ``P`` distinct prompts of (P, 32) token ids."""
        output = self.model.get_text_features(input_ids=input_ids_PT, attention_mask=attention_mask_PT)
        return TextFeatures(output.pooler_output, attention_mask_PT.bool())

    def encode_geometry(
        self, vision: VisionFeatures, boxes_cxcywh_BN4: Tensor, labels_BN: Tensor, image_index_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of box exemplars and the CLS token: (B, N + 1, C) and their mask. Label 1, 0, or -10 for padding."""
        dtype = self.model.geometry_encoder.cls_embed.weight.dtype
        maps_BCHW = vision.maps_ICHW[-1][image_index_B].to(dtype)
        positions = vision.positions_1CHW[-1].to(dtype).expand(len(image_index_B), -1, -1, -1)
        # Box pooling (roi_align) has no bfloat16 kernel and fails under autocast on a CPU; these tokens are few.
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

    def _geometry_cls_tokens(self, vision: VisionFeatures) -> Tensor:
        """The CLS token of each image without boxes, (I, 1, C): it depends on the image only, not on the prompt."""
        num_images, device = len(vision.maps_ICHW[-1]), vision.maps_ICHW[-1].device
        boxes = torch.zeros(num_images, 0, 4, device=device)
        labels = torch.zeros(num_images, 0, device=device, dtype=torch.long)
        tokens, _ = self.encode_geometry(vision, boxes, labels, torch.arange(num_images, device=device))
        return tokens

    # ---- detector -------------------------------------------------------------------------------------------------

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
    ) -> Detections:
        """Run everything between the encoders and the masks for ``B`` find queries.

        Args:
            image_index_B, text_index_B: rows of ``vision`` and ``text`` that make each find query.
            boxes_cxcywh_BN4, box_labels_BN: optional exemplar boxes in [0, 1] and labels 1, 0 or -10 (padding).
            one_to_many: also run the duplicated object queries that training supervises one-to-many.
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
            tokens = self._geometry_cls_tokens(vision)[image_index_B]
            prompt = torch.cat([prompt, tokens.to(prompt.dtype)], 1)
            prompt_mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt), 1)], 1)
        return self.detect_prompted(vision, prompt, prompt_mask, image_index_B, one_to_many=one_to_many)

    def detect_prompted(
        self,
        vision: VisionFeatures,
        prompt_BTC: Tensor,
        prompt_mask_BT: Tensor,
        image_index_B: Tensor,
        *,
        one_to_many: bool = False,
    ) -> Detections:
        """`detect` of prompts whose tokens, text and geometry, are made: ``prompt_mask_BT`` is True at real ones."""
        coarse = vision.maps_ICHW[-1]
        size_hw = (coarse.shape[-2], coarse.shape[-1])
        tokens_BSC = coarse.flatten(2).transpose(1, 2)[image_index_B]
        positions_BSC = vision.positions_1CHW[-1].flatten(2).transpose(1, 2).expand(len(prompt_BTC), -1, -1)
        memory = self._fuse(tokens_BSC, positions_BSC, prompt_BTC, prompt_mask_BT)
        return self._decode(
            memory,
            positions_BSC,
            prompt_BTC,
            prompt_mask_BT,
            size_hw,
            one_to_many,
            image_index_B=image_index_B,
            vision=vision,
        )

    def _fuse(self, tokens_BSC: Tensor, positions_BSC: Tensor, prompt_BTC: Tensor, prompt_mask_BT: Tensor) -> Tensor:
        """The DETR encoder: image tokens attend to each other and to the prompt."""
        encoder = self.model.detr_encoder
        attention_mask = create_bidirectional_mask(
            config=encoder.config,
            inputs_embeds=tokens_BSC,
            attention_mask=prompt_mask_BT,
            encoder_hidden_states=prompt_BTC,
        )
        hidden = tokens_BSC
        for layer in encoder.layers:
            hidden = self._run("detr_encoder", layer, hidden, prompt_BTC, positions_BSC, attention_mask)
        return hidden

    def _decode(
        self,
        memory_BSC: Tensor,
        positions_BSC: Tensor,
        prompt_BTC: Tensor,
        prompt_mask_BT: Tensor,
        size_hw: tuple[int, int],
        one_to_many: bool,
        **context,
    ) -> Detections:
        """The DETR decoder with every layer's output.

        The sequence is [presence | one-to-one queries | one-to-many queries]; the last part has the same embeddings as
        the second, takes no part in self-attention and so leaves the one-to-one half as it is without it.
        """
        decoder = self.model.detr_decoder
        num_queries = decoder.query_embed.num_embeddings
        copies = 2 if one_to_many else 1
        batch = len(memory_BSC)
        queries = torch.cat([decoder.presence_token.weight, *[decoder.query_embed.weight] * copies])
        hidden = queries.unsqueeze(0).expand(batch, -1, -1)
        references = decoder.reference_points.weight.float().sigmoid().repeat(copies, 1).unsqueeze(0)
        references = references.expand(batch, -1, -1)
        stored_references = references
        attention_mask = create_bidirectional_mask(
            config=decoder.config,
            inputs_embeds=hidden,
            attention_mask=prompt_mask_BT,
            encoder_hidden_states=prompt_BTC,
        )
        keys_BSC = memory_BSC + positions_BSC
        states, boxes, presence = [], [], []
        for layer in decoder.layers:
            hidden = self._run(
                "detr_decoder",
                self._decoder_layer,
                layer,
                hidden,
                references,
                prompt_BTC,
                attention_mask,
                memory_BSC,
                keys_BSC,
                size_hw,
                1 + num_queries,
            )
            normed = decoder.output_layer_norm(hidden[:, 1:])
            # Boxes stay in float32: bfloat16 would be off by several pixels at 1008.
            with torch.autocast(hidden.device.type, enabled=False):
                offsets = decoder.box_head(normed.to(decoder.box_head.layer1.weight.dtype)).float()
            boxes.append((inverse_sigmoid(stored_references) + offsets).sigmoid())
            stored_references = (inverse_sigmoid(references) + offsets).sigmoid()
            references = stored_references.detach()
            states.append(normed)
            presence_logits = decoder.presence_head(decoder.presence_layer_norm(hidden[:, 0]))
            limit = decoder.clamp_presence_logit_max_val
            presence.append(presence_logits.squeeze(-1).clamp(-limit, limit))

        states_LBQC, boxes_LBQ4 = torch.stack(states), torch.stack(boxes)
        scores = self._run("scoring", self.model.dot_product_scoring, states_LBQC, prompt_BTC, prompt_mask_BT)
        logits_LBQ = scores.squeeze(-1)
        split = num_queries
        hidden_BQC = {"o2o": states_LBQC[-1][:, :split], "o2m": states_LBQC[-1][:, split:]}
        return Detections(
            logits_LBQ=logits_LBQ[:, :, :split],
            boxes_cxcywh_LBQ4=boxes_LBQ4[:, :, :split],
            presence_logits_LB=torch.stack(presence),
            logits_o2m_LBQ=logits_LBQ[:, :, split:] if one_to_many else None,
            boxes_o2m_LBQ4=boxes_LBQ4[:, :, split:] if one_to_many else None,
            hidden_BQC=hidden_BQC,
            encoder_hidden_BSC=memory_BSC,
            prompt_BTC=prompt_BTC,
            prompt_mask_BT=prompt_mask_BT,
            **context,
        )

    def _decoder_layer(
        self, layer, hidden, references, prompt, prompt_attention_mask, memory, keys, size_hw, num_self_attended
    ) -> Tensor:
        decoder = self.model.detr_decoder
        sine = decoder.position_encoding.encode_boxes(references)
        query_pos = decoder.ref_point_head(sine.to(decoder.ref_point_head.layer1.weight.dtype))
        query_pos = F.pad(query_pos.to(hidden.dtype), (0, 0, 1, 0))
        # The presence token attends everywhere alike: a row of zeros.
        bias = F.pad(decoder._get_rpb_matrix(references, size_hw), (0, 0, 1, 0)).to(hidden.dtype)

        attending, bypassing = hidden[:, :num_self_attended], hidden[:, num_self_attended:]
        with_pos = attending + query_pos[:, :num_self_attended]
        attended, _ = layer.self_attn(query=with_pos, key=with_pos, value=attending, attention_mask=None)
        hidden = torch.cat([attending + layer.self_attn_dropout(attended), bypassing], 1)
        hidden = layer.self_attn_layer_norm(hidden)

        attended, _ = layer.text_cross_attn(
            query=hidden + query_pos, key=prompt, value=prompt, attention_mask=prompt_attention_mask
        )
        hidden = layer.text_cross_attn_layer_norm(hidden + layer.text_cross_attn_dropout(attended))

        attended, _ = layer.vision_cross_attn(query=hidden + query_pos, key=keys, value=memory, attention_mask=bias)
        hidden = layer.vision_cross_attn_layer_norm(hidden + layer.vision_cross_attn_dropout(attended))
        return layer.mlp_layer_norm(hidden + layer.mlp_dropout(layer.mlp(hidden)))

    # ---- masks ----------------------------------------------------------------------------------------------------

    def mask_head(self, detections: Detections, rows_K: Tensor) -> MaskHead:
        """Pixel embeddings of the ``K`` find queries that need masks, once for all their object queries."""
        decoder = self.model.mask_decoder
        memory, prompt = detections.encoder_hidden_BSC[rows_K], detections.prompt_BTC[rows_K]
        normed = decoder.prompt_cross_attn_norm(memory)
        attention_mask = create_bidirectional_mask(
            config=decoder.config,
            inputs_embeds=normed,
            attention_mask=detections.prompt_mask_BT[rows_K],
            encoder_hidden_states=prompt,
        )
        attended, _ = decoder.prompt_cross_attn(query=normed, key=prompt, value=prompt, attention_mask=attention_mask)
        memory = memory + decoder.prompt_cross_attn_dropout(attended)
        maps = detections.vision.select(detections.image_index_B[rows_K])
        maps[-1] = memory.transpose(1, 2).reshape(maps[-1].shape)
        pixels_KCHW = self._run("mask_decoder", decoder.pixel_decoder, maps)
        return MaskHead(self.model, detections, rows_K, pixels_KCHW)

    # ---- gradient checkpointing -----------------------------------------------------------------------------------

    def _run(self, component: str, function: Callable, *arguments):
        if component in self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


class MaskHead:
    """Instance and semantic mask logits of selected object queries, four to a patch side (1008: 288 x 288)."""

    def __init__(self, model: Sam3Model, detections: Detections, rows_K: Tensor, pixels_KCHW: Tensor) -> None:
        self._decoder = model.mask_decoder
        self._detections = detections
        self._rows_K = rows_K
        self._pixels_KCHW = pixels_KCHW
        self._instance_KCHW: Tensor | None = None
        self._queries_KQC: dict[str, Tensor] = {}
        # The loss asks for masks from outside the autocast block of the forward: go on at the forward's precision.
        device = pixels_KCHW.device.type
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        self._position_B = torch.full((len(detections.image_index_B),), -1, device=rows_K.device)
        self._position_B[rows_K] = torch.arange(len(rows_K), device=rows_K.device)

    def prepare(self, branch: str = "o2o") -> None:
        """Run the layers of instance masks for every object query of ``rows_K``.

        What `instance_logits` then does are matrix products without any weight of the model.
        """
        with torch.autocast(**self._autocast):
            self._instance_KCHW = self._decoder.instance_projection(self._pixels_KCHW)
            hidden_KQC = self._detections.hidden_BQC[branch][self._rows_K]
            self._queries_KQC[branch] = self._decoder.mask_embedder(hidden_KQC)

    def instance_logits(self, b_index_M: Tensor, q_index_M: Tensor, branch: str = "o2o") -> Tensor:
        """Mask logits (M, h, w) of the pairs (find query, object query); ``b_index_M`` must be among ``rows_K``."""
        with torch.autocast(**self._autocast):
            if self._instance_KCHW is None:
                self._instance_KCHW = self._decoder.instance_projection(self._pixels_KCHW)
            height, width = self._pixels_KCHW.shape[-2:]
            position_M = self._position_B[b_index_M]
            if branch in self._queries_KQC:
                queries_MC = self._queries_KQC[branch][position_M, q_index_M]
            else:
                queries_MC = self._decoder.mask_embedder(self._detections.hidden_BQC[branch][b_index_M, q_index_M])
            order = position_M.argsort(stable=True)
            # One matrix product per find query: gathering (M, C, h, w) pixel embeddings would take M x 85 MB at 1008.
            counts = torch.bincount(position_M, minlength=len(self._pixels_KCHW)).tolist()
            products = [
                queries @ pixels.flatten(1)
                for queries, pixels in zip(queries_MC[order].split(counts), self._instance_KCHW, strict=True)
                if len(queries)
            ]
            if not products:
                return queries_MC.new_zeros(0, height, width)
            return torch.cat(products)[order.argsort()].view(-1, height, width)

    def branch_logits(self, branch: str, b_index_M: Tensor, q_index_M: Tensor) -> Tensor:
        """``instance_logits`` with the arguments in the order that the loss asks in."""
        return self.instance_logits(b_index_M, q_index_M, branch)

    def semantic_logits(self, b_index_K: Tensor) -> Tensor:
        """Logits (K, h, w) of "this pixel belongs to the prompt" for the find queries asked for."""
        with torch.autocast(**self._autocast):
            pixels = self._pixels_KCHW[self._position_B[b_index_K]]
            return self._decoder.semantic_projection(pixels).squeeze(1)
