"""What a training step of a dense preset takes of a GPU's memory at full size, counted without a GPU as in `memory`."""

from __future__ import annotations

from typing import Any, cast

import torch

from jobs.bench.gpu_timing import Row
from jobs.bench.memory import as_on_a_gpu
from jobs.bench.models import FULL_SIZE, random_model
from jobs.bench.pretend_gpu import DEVICE, pretend_gpu
from jobs.bench.tensor_memory import TensorMemory
from sam3lora.config import Config, load_config
from sam3lora.losses.dense import DenseCriterion
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.checkpointing import enable_checkpointing
from sam3lora.model.components import unwrap
from sam3lora.model.dense.model import DenseSam3, chosen_layers
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.precision import store_matrices_in
from sam3lora.model.staged.trunk import keep_trunk_only

PRESETS = ("dense", "dense_1008", "sam3_unet")
CLASSES = 5


def dense_rows(presets: tuple[str, ...] = PRESETS) -> list[Row]:
    rows: list[Row] = []
    for preset in presets:
        config = load_config(preset)
        images = cast(int, config.training.batch_size)
        key = {"preset": preset, "images": images, "pixels": config.model.resolution or 1008}
        peaks = {name: dense_peak_bytes(config, images, bf16=name == "bf16") / 1e9 for name in ("bf16", "fp32")}
        rows.append(key | {f"{name} GB": peak for name, peak in peaks.items()})
    return rows


def dense_peak_bytes(config: Config, images: int, *, bf16: bool) -> int:
    """The most bytes that tensors take at a time in a step, weights and AdamW's moments included."""
    dense = config.dense
    with TensorMemory(torch.device("meta")) as memory, pretend_gpu(with_values=False), as_on_a_gpu():
        sam3 = random_model(FULL_SIZE, device=DEVICE, resolution=config.model.resolution)
        keep_trunk_only(sam3)
        learning: Any = apply_lora(sam3, config.lora.settings) if dense.adapter == "lora" else sam3
        trunk = cast(Any, sam3).vision_encoder.backbone
        settings = DenseSettings(
            mode="multiclass",
            classes=tuple(f"class {number}" for number in range(CLASSES)),
            layers=chosen_layers(dense.layers, trunk),
            width=dense.width,
            norm=dense.norm,
            bottleneck_width=dense.bottleneck_width if dense.adapter == "bottleneck" else None,
        )
        with torch.device(DEVICE):
            model = DenseSam3(learning, settings)
        enable_checkpointing(unwrap(learning), tuple(cast(tuple, config.training.gradient_checkpointing)))
        if bf16:
            store_matrices_in(sam3, torch.bfloat16, text_tower=False)
        model.train()
        side = trunk.config.image_size
        dtype = next(trunk.parameters()).dtype
        pixels = torch.empty(images, 3, side, side, dtype=dtype, device=DEVICE)
        labels = torch.zeros(images, side // 14 * 4, side // 14 * 4, dtype=torch.uint8, device=DEVICE)
        criterion = DenseCriterion(settings.mode, level_weights=dense.level_weights)
        memory.forget_peak()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
            logits = model.logits(model.encode(pixels), len(criterion.level_weights))
        criterion(logits, labels, images).total.backward()
        return memory.peak_bytes + 2 * sum(one.nbytes for one in model.parameters() if one.requires_grad)


if __name__ == "__main__":
    for row in dense_rows():
        print(row)
