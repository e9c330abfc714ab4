"""The stages of SAM 3 in training, each captured with its gradients and then started as one; and the costs of matching.

A step of training starts thousands of small kernels, and on a GPU it waits for the host to start them. What depends on
values, the assignment and the loss of what was assigned, stays outside.

Shapes: ``B`` find queries, ``K`` of them with masks, ``I`` images; the others as in `model.staged.stage_outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sam3lora.engine.graphs.stage import SIZES
from sam3lora.model.adapter.lora_products import adapters_cast_once
from sam3lora.model.checkpointing import recomputed_by_key, repeats_by_key
from sam3lora.model.components import COMPONENTS, component_of
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.model.staged.stage_outputs import DetectorOutput, VisionFeatures, rows_of
from sam3lora.training.graphs.gradient_graphs import GradientGraphs, GraphedFunction, Tensors

_BY_LAYER = ("logits_LBQ", "boxes_cxcywh_LBQ4", "presence_logits_LB", "raw_presence_logits_LB")
_BY_LAYER_O2M = ("logits_o2m_LBQ", "boxes_o2m_LBQ4")


class GraphedSam3(StagedSam3):
    """`StagedSam3` whose stages are graphs where they can be.

    What a stage returns is read before the stage runs again, and its backward pass comes before that too.
    """

    def __init__(self, *args: Any, graphs: GradientGraphs, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plain = StagedSam3(*args, **kwargs)  # what is captured: no graph starts another
        self._graphs = graphs
        self._captured_in: dict[bool, frozenset[str]] = {}  # training mode, or not
        self._functions: dict[Hashable, GraphedFunction] = {}
        self._positions: dict[str, list[Tensor]] = {}  # the same for all images

    runs_to_settle = 3  # as it is, captured, repeated

    def begin_batch(self) -> None:
        self._graphs.begin()

    def forget_graphs(self) -> None:
        self._graphs.forget()
        self._captured_in.clear()

    @property
    def _captured(self) -> frozenset[str]:
        """The components that are captured; the text tower is not, for it runs once for a prompt."""
        mode = self.model.training
        if mode not in self._captured_in:
            differing = {name for name in self.checkpointing if not repeats_by_key(self.model, name)}
            self._captured_in[mode] = frozenset(COMPONENTS) - {"text_encoder"} - differing
        return self._captured_in[mode]

    def give_up_graphs(self) -> bool:
        return self._graphs.give_up()

    def adapters_cast_once(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Only of adapters outside of the graphs: a graph casts its own, for it does not see the copies of a step."""
        return adapters_cast_once(self.model, dtype, set(COMPONENTS) - self._captured)

    def encode_images(self, pixel_values_ICHW: Tensor) -> VisionFeatures:
        return self._maps("the vision encoder", self._plain.encode_images, pixel_values_ICHW)

    def encode_rest(self, tokens_ISC: Tensor, num_layers: int | None = None) -> VisionFeatures:
        def encode(tokens: Tensor) -> VisionFeatures:
            return self._plain.encode_rest(tokens, num_layers)

        return self._maps("the end of the vision encoder", encode, tokens_ISC, num_layers)

    def _maps(
        self, name: str, encode: Callable[[Tensor], VisionFeatures], given: Tensor, *settings: Hashable
    ) -> VisionFeatures:
        def maps_of(inputs: Tensor) -> Tensors:
            vision = encode(inputs)
            self._keep_positions("images", vision.positions_1CHW)
            return tuple(vision.maps_ICHW)

        maps = self._graphed(name, ("vision_encoder",), maps_of, *settings)(given)
        return VisionFeatures(list(maps), self._positions["images"])

    def prepare(self, vision: VisionFeatures) -> VisionFeatures:
        def begin(coarse_ICHW: Tensor) -> Tensors:
            coarse = VisionFeatures([coarse_ICHW], self._positions["coarse"])
            begun_ISC = self._plain.begin_fusion(coarse)
            return (begun_ISC, self._plain.geometry_cls_tokens(coarse)) if self.geometry_cls else (begun_ISC,)

        self._keep_positions("coarse", vision.positions_1CHW[-1:])
        components = ("detr_encoder", "geometry_encoder")
        begun_ISC, *cls = self._graphed("the start of the detector", components, begin)(vision.maps_ICHW[-1])
        return replace(vision, begun_ISC=begun_ISC, cls_I1C=cls[0] if cls else None)

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
        if begun_BSC is None:
            begun_ISC = self.begin_fusion(vision) if vision.begun_ISC is None else vision.begun_ISC
            begun_BSC = rows_of(begun_ISC, image_index_B)
        self._keep_positions("coarse", vision.positions_1CHW[-1:])
        num, size_hw = len(prompt_BTC), vision.maps_ICHW[-1].shape[-2:]
        names = _BY_LAYER + (_BY_LAYER_O2M if one_to_many else ())

        def detect(begun: Tensor, prompt: Tensor, mask: Tensor) -> Tensors:
            coarse = VisionFeatures([begun.new_empty(1, 0, *size_hw)], self._positions["coarse"])
            index = torch.arange(0, device=begun.device)
            found = self._plain.detect_prompted(coarse, prompt, mask, index, begun_BSC=begun, one_to_many=one_to_many)
            hidden = [found.hidden_BQC[branch] for branch in (("o2o", "o2m") if one_to_many else ("o2o",))]
            return (found.encoder_hidden_BSC, *hidden, *(getattr(found, name) for name in names))

        components = ("detr_encoder", "detr_decoder", "scoring")
        graphed = self._graphed("the detector", components, detect, one_to_many, size_hw)
        inputs = [_padded(one, _size_for(num)) for one in (begun_BSC, prompt_BTC, prompt_mask_BT)]
        memory_BSC, hidden_BQC, *rest = graphed(*inputs)
        branches = {"o2o": hidden_BQC[:num], "o2m": rest.pop(0)[:num] if one_to_many else hidden_BQC[:num, :0]}
        values: dict[str, Any] = dict.fromkeys(_BY_LAYER_O2M) | {
            name: one[:, :num] for name, one in zip(names, rest, strict=True)
        }
        return DetectorOutput(
            **values,
            hidden_BQC=branches,
            encoder_hidden_BSC=memory_BSC[:num],
            prompt_BTC=prompt_BTC,
            prompt_mask_BT=prompt_mask_BT,
            image_index_B=image_index_B,
            vision=vision,
        )

    def embed_pixels(
        self, memory_KSC: Tensor, prompt_KTC: Tensor, prompt_mask_KT: Tensor, maps_KCHW: list[Tensor]
    ) -> Tensor:
        num = len(memory_KSC)

        def embed(memory: Tensor, prompt: Tensor, mask: Tensor, *maps: Tensor) -> Tensors:
            return (self._plain.embed_pixels(memory, prompt, mask, list(maps)),)

        inputs = (memory_KSC, prompt_KTC, prompt_mask_KT, *maps_KCHW)
        graphed = self._graphed("the mask head", ("mask_decoder",), embed)
        (pixels_KCHW,) = graphed(*(_padded(one, _size_for(num)) for one in inputs))
        return pixels_KCHW[:num]

    def _graphed(
        self, name: str, components: tuple[str, ...], function: Callable[..., Tensors], *settings: Hashable
    ) -> Callable[..., Tensors]:
        """The graphs of this name and settings; `function` is taken at the first call."""
        if not self._captured.issuperset(components):
            return function
        key = (name, self.model.training, *settings)
        if key not in self._functions:
            named = self.model.named_parameters()
            parameters = [parameter for path, parameter in named if component_of(path) in components]

            def run(*inputs: Tensor) -> Tensors:
                device = inputs[0].device.type
                with ExitStack() as stack:
                    stack.enter_context(recomputed_by_key())
                    if torch.is_autocast_enabled(device):
                        dtype = torch.get_autocast_dtype(device)
                        stack.enter_context(adapters_cast_once(self.model, dtype, components))
                    return function(*inputs)

            self._functions[key] = GraphedFunction(name, run, parameters, self._graphs)
        return self._functions[key]

    def _keep_positions(self, name: str, positions_1CHW: list[Tensor]) -> None:
        """A copy of its own for graphs, which read the memory that they have seen."""
        if name not in self._positions:
            self._positions[name] = [position.detach().clone() for position in positions_1CHW]


class GraphedCosts:
    """`CostTables` in graphs, for numbers of targets that are padded as find queries are."""

    def __init__(self, tables: Callable[..., Tensor], graphs: GradientGraphs) -> None:
        self._tables, self._graphs = tables, graphs
        self._functions: dict[bool, GraphedFunction] = {}

    @torch.no_grad()
    def __call__(
        self, logits_KBQ: Tensor, boxes_KBQ4: Tensor, query_index_T: Tensor, target_boxes_T4: Tensor, *, both: bool
    ) -> Tensor:
        num = len(target_boxes_T4)
        if num == 0:
            return self._tables(logits_KBQ, boxes_KBQ4, query_index_T, target_boxes_T4, both=both)
        if both not in self._functions:
            self._functions[both] = GraphedFunction(
                "matching", lambda *tensors: (self._tables(*tensors, both=both),), (), self._graphs
            )
        padded = [_padded(one, _size_for(num, smallest=8)) for one in (query_index_T, target_boxes_T4)]
        (costs_KTQ,) = self._functions[both](logits_KBQ, boxes_KBQ4, *padded)
        return costs_KTQ[:, :num]


def _size_for(num_rows: int, *, smallest: int = 1) -> int:
    """The number to pad to; larger numbers stay, and run without a graph unless they recur."""
    return next((size for size in SIZES if size >= max(num_rows, smallest)), num_rows)


def _padded(rows_B: Tensor, size: int) -> Tensor:
    """Rows with the first one repeated up to `size`; what is computed from the repetitions is not used."""
    missing = size - len(rows_B)
    return rows_B if missing == 0 else torch.cat([rows_B, rows_B[:1].expand(missing, *rows_B.shape[1:])])
