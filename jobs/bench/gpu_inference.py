"""Inference of SAM 3 on one image, stage by stage: eager, compiled, with adapters, and asked again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Sam3Model

from jobs.bench.gpu_timing import Row, Stopwatch, forget_peak, median_ms, medians, peak_gb
from jobs.bench.gpu_training import Case, Inputs, Preset, Training
from jobs.bench.models import random_model
from sam3lora.model.adapter.bank import AdapterBank
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.forward import DetectorOutput, StagedSam3, TextFeatures, VisionFeatures

KEPT = 30
"""Object queries whose masks are made."""

SIZE_HW = (1500, 2000)
"""Of the image that masks are brought back to."""

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@dataclass
class Inference:
    """One image and its prompts, asked under bfloat16 autocast; random weights, pixels and token ids.

    Attributes:
        encode: The vision encoder, or a compiled one.
        drawn_KHW: Mask logits for post-processing; None leaves it out. Masks of random weights are noise, which takes
            seconds to encode, so discs stand in for them.
    """

    staged: StagedSam3
    pixels_1CHW: Tensor
    ids_PT: Tensor
    encode: Callable[[Tensor], VisionFeatures]
    drawn_KHW: Tensor | None

    @classmethod
    def of(cls, model: Sam3Model, num_prompts: int, device: torch.device) -> Inference:
        config = cast(Any, model.config)
        torch.manual_seed(0)
        staged = StagedSam3(model)
        ids_PT = torch.randint(3, config.text_config.vocab_size, (num_prompts, 32), device=device)
        pixels = torch.rand(1, 3, config.image_size, config.image_size, device=device) * 2 - 1
        return cls(staged, pixels, ids_PT, staged.encode_images, _draw_masks(config))

    @torch.no_grad()
    def first_call(self, watch: Stopwatch) -> VisionFeatures:
        """Everything, from pixels to run-length codes."""
        with watch.part("vision"), self._autocast():
            vision = self.staged.prepare(self.encode(self.pixels_1CHW))
        self.answer(vision, self.encode_text(watch), watch)
        return vision

    def encode_text(self, watch: Stopwatch) -> TextFeatures:
        with torch.no_grad(), watch.part("text"), self._autocast():
            return self.staged.encode_text(self.ids_PT, torch.ones_like(self.ids_PT))

    @torch.no_grad()
    def answer(self, vision: VisionFeatures, text: TextFeatures, watch: Stopwatch) -> None:
        """What is left for an image and prompts that were seen before: detector, masks, post-processing."""
        num_prompts = len(self.ids_PT)
        device = self.pixels_1CHW.device
        with watch.part("detector"), self._autocast():
            rows = torch.arange(num_prompts, device=device)
            found = self.staged.detect(vision, text, torch.zeros_like(rows), rows)
        best_BK = found.scores_BQ().topk(min(KEPT, found.logits_LBQ.shape[-1])).indices.cpu()
        with watch.part("masks"), self._autocast():
            head = self.staged.mask_head(found, torch.arange(num_prompts))
            query_M = torch.arange(num_prompts).repeat_interleave(best_BK.shape[1])
            head.instance_logits(query_M, best_BK.flatten())
        if self.drawn_KHW is not None:
            with watch.part("post-processing"):
                _post_process(found, self.drawn_KHW[: best_BK.shape[1]], best_BK)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.pixels_1CHW.device.type, dtype=torch.bfloat16)


def measure_inference(
    model_name: str, device: torch.device, *, prompts: tuple[int, ...] = (1, 8, 32), repeats: int = 20
) -> list[Row]:
    """A row for each number of prompts and way: the first call with its stages, and one about the same image."""
    rows: list[Row] = []
    model = base_model(model_name, device)
    for num_prompts in prompts:
        rows.append(_timed("eager", Inference.of(model, num_prompts, device), device, repeats))
    for mode in ("default", "reduce-overhead"):
        way = f"compiled vision, {mode}"
        if device.type != "cuda":
            rows.append({"way": way, "note": "needs a GPU"})
            continue
        asked = Inference.of(model, 1, device)
        asked.encode = _compiled(model, mode)
        rows.append(_timed(way, asked, device, repeats))
    return rows


def _timed(way: str, asked: Inference, device: torch.device, repeats: int) -> Row:
    watch = Stopwatch(device)
    forget_peak(device)
    for _ in range(3):
        vision = asked.first_call(watch)
    watch.milliseconds()
    rounds = []
    for _ in range(repeats):
        vision = asked.first_call(watch)
        rounds.append(watch.milliseconds())
    text = asked.encode_text(watch)
    watch.milliseconds()
    again = median_ms(lambda: asked.answer(vision, text, Stopwatch(device)), device, repeats=repeats)
    whole = median_ms(lambda: asked.first_call(Stopwatch(device)), device, repeats=repeats, warm_ups=0)
    return {
        "way": way,
        "prompts": len(asked.ids_PT),
        "first call ms": whole,
        "again ms": again,
        "again / first": again / whole,
        **{f"{name} ms": taken for name, taken in medians(rounds).items()},
        "peak GB": peak_gb(device),
        **({"note": "post-processing needs pycocotools"} if asked.drawn_KHW is None else {}),
    }


def measure_adapters(
    model_name: str, device: torch.device, *, presets: tuple[str, ...] = ("balanced", "maximum"), repeats: int = 20
) -> list[Row]:
    """What an adapter adds to a first call with one prompt, by the bank of the server and by PEFT's own layers."""
    rows: list[Row] = []
    for preset in presets:
        model = base_model(model_name, device)
        asked = Inference.of(model, 1, device)
        asked.drawn_KHW = None

        def call(asked: Inference = asked) -> float:
            return median_ms(lambda: asked.first_call(Stopwatch(device)), device, repeats=repeats)

        bare = call()
        with tempfile.TemporaryDirectory() as folder:
            peft = apply_lora(model, Preset.read(preset).lora)
            _randomise(peft)
            save_adapter(peft, folder, AdapterMetadata(base_model=model_name, prompts=["thing"]))
            with_peft = call()
            model = cast(Sam3Model, peft.unload())
            bank = AdapterBank(model, 1)
            bank.put(0, read_adapter_weights(folder, model, check_base=False))
        with bank.rows([0]):
            with_bank = call()
        for way, taken in (("bank", with_bank), ("PEFT", with_peft)):
            rows.append(
                {"preset": preset, "way": way, "base ms": bare, "ms": taken, "overhead %": 100 * (taken / bare - 1)}
            )
        del model, peft, bank, asked
    return rows


def check_attention(model_name: str, device: torch.device) -> Row:
    """Whether inference and a training step run where attention may not fall back to whole matrices."""
    found: Row = {}
    model = base_model(model_name, device)
    asked = Inference.of(model, 2, device)
    asked.drawn_KHW = None
    found["inference"] = _runs_fused(lambda: asked.first_call(Stopwatch(device)))
    case = Case("maximum", prompts=2, objects=1)
    model = random_model(model_name, device=device)
    training = Training(model, case)
    inputs = Inputs.draw(model, case, device)
    found["training"] = _runs_fused(lambda: training.step(inputs))
    return found


def _runs_fused(run: Callable[[], object]) -> str:
    try:
        with sdpa_kernel(FUSED):
            run()
    except RuntimeError as error:
        return f"no: {str(error).splitlines()[0]}"
    return "fused everywhere"


def base_model(model_name: str, device: torch.device) -> Sam3Model:
    model = random_model(model_name, device=device)
    store_matrices_in(model, torch.bfloat16, text_tower=True)
    return model


def _compiled(model: Sam3Model, mode: str) -> Callable[[Tensor], VisionFeatures]:
    compiled = torch.compile(model.vision_encoder, mode=mode)

    def encode(pixels_ICHW: Tensor) -> VisionFeatures:
        found = VisionFeatures.from_output(compiled(pixels_ICHW))
        # What a CUDA graph gives is overwritten by the next run.
        found.maps_ICHW = [maps.clone() for maps in found.maps_ICHW]
        return found

    return encode


def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def _draw_masks(config: Any) -> Tensor | None:
    """Logits of `KEPT` discs in the size of the model's masks; None without the packages that encode masks."""
    try:
        from jobs.bench.postprocess import Workload
    except ImportError:
        return None
    return Workload("blobs", num_masks=KEPT, mask_side=config.image_size // 14 * 4).draw()[1]


def _post_process(found: DetectorOutput, drawn_KHW: Tensor, best_BK: Tensor) -> None:
    """Suppression and run-length codes of masks of each prompt."""
    from sam3lora.config.post_processing import PostProcessing
    from sam3lora.engine.mask_codes import encode_logits
    from sam3lora.engine.postprocess import select

    post = PostProcessing(threshold=0.0, nms="box", nms_iou=1.0)
    scores_BQ, boxes_BQ4 = found.scores_BQ().cpu(), found.boxes_cxcywh_LBQ4[-1].float().cpu()
    for row, best_K in enumerate(best_BK):
        kept = select(scores_BQ[row, best_K], boxes_BQ4[row, best_K], drawn_KHW, post)
        assert kept.mask_logits_NHW is not None
        for mask in kept.mask_logits_NHW.numpy():
            encode_logits(mask, SIZE_HW)
