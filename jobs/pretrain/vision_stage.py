"""Stage one: teach the vision tower what stands where, by dense labels and temporary heads.

Every patch is asked for the noun, colour, texture, box and outline of the object that covers it, and the finest feature
map for the noun of every pixel. A detector trained from scratch takes far longer to form these features by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3Model

from jobs.pretrain.bank import COLOURS, NOUNS, SceneBank
from jobs.pretrain.snapshot import Snapshot
from sam3lora.data.synth.scenes import TEXTURES

GRID, PATCH, FINE = 16, 14, 64
NONE = -100  # ignored by cross entropy


@dataclass
class DenseTargets:
    """Labels of ``I`` images: per patch (I, 256, ...) and per pixel of the finest feature map (I, 64, 64)."""

    noun: Tensor
    colour: Tensor
    texture: Tensor
    boxes_cxcywh: Tensor
    outline: Tensor
    covered: Tensor
    fine_noun: Tensor


class DenseHeads(nn.Module):
    """The temporary heads of the vision stage."""

    def __init__(self, width: int = 128, fpn_width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.noun = nn.Linear(width, len(NOUNS) + 1)
        self.colour = nn.Linear(width, len(COLOURS))
        self.texture = nn.Linear(width, len(TEXTURES) + 1)
        self.box = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))
        self.outline = nn.Linear(width, 49)
        self.fine_noun = nn.Conv2d(fpn_width, len(NOUNS) + 1, 1)
        # The detector sees the image through the coarse map alone: every attribute must come through there.
        self.coarse_noun = nn.Linear(fpn_width, len(NOUNS) + 1)
        self.coarse_colour = nn.Linear(fpn_width, len(COLOURS))
        self.coarse_texture = nn.Linear(fpn_width, len(TEXTURES) + 1)

    def losses(self, tokens_ISD: Tensor, maps: list[Tensor], targets: DenseTargets) -> dict[str, Tensor]:
        tokens = self.norm(tokens_ISD)
        weights = torch.ones(len(NOUNS) + 1)
        weights[-1] = 0.3  # background
        covered = targets.covered
        boxes = self.box(tokens).float().sigmoid()[covered]
        coarse = maps[-1].flatten(2).transpose(1, 2)

        def labelled(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
            flat = logits.float().flatten(0, 1), labels.flatten()
            return F.cross_entropy(*flat, weight, ignore_index=NONE)

        return {
            "noun": labelled(self.noun(tokens), targets.noun, weights),
            "colour": 0.5 * labelled(self.colour(tokens), targets.colour),
            "texture": 0.5 * labelled(self.texture(tokens), targets.texture),
            "coarse_noun": 0.5 * labelled(self.coarse_noun(coarse), targets.noun, weights),
            "coarse_colour": 0.5 * labelled(self.coarse_colour(coarse), targets.colour),
            "coarse_texture": 0.5 * labelled(self.coarse_texture(coarse), targets.texture),
            "box": 4 * F.l1_loss(boxes, targets.boxes_cxcywh[covered]),
            "outline": F.binary_cross_entropy_with_logits(self.outline(tokens).float(), targets.outline),
            "fine_noun": F.cross_entropy(self.fine_noun(maps[0]).float(), targets.fine_noun, weights),
        }


def dense_targets(labels_IHW: np.ndarray, attributes_IK3: np.ndarray) -> DenseTargets:
    """Labels of patches and pixels from instance maps and object attributes (see ``SceneBank``)."""
    count, size, _ = labels_IHW.shape
    objects = attributes_IK3.shape[1]
    onehot = labels_IHW[:, None] == np.arange(1, objects + 1, dtype=np.uint8)[None, :, None, None]
    cells = onehot.reshape(count, objects, GRID, PATCH, GRID, PATCH).mean((3, 5), dtype=np.float32)
    owner = cells.argmax(1)
    covered = np.take_along_axis(cells, owner[:, None], 1)[:, 0] > 0.12

    def attribute(column: int, missing: int) -> np.ndarray:
        values = np.take_along_axis(attributes_IK3[:, :, column].astype(np.int64), owner.reshape(count, -1), 1)
        return np.where(covered.reshape(count, -1) & (values >= 0), values, missing)

    noun = attribute(0, len(NOUNS))
    colour = attribute(1, NONE)
    texture = np.where(colour == NONE, NONE, attribute(2, len(TEXTURES)))
    boxes = np.zeros((count, objects, 4), np.float32)
    for number in range(objects):
        for axis, low in ((1, 0), (0, 1)):
            line = onehot[:, number].any(1 + (axis == 0))
            first, last = line.argmax(1), size - line[:, ::-1].argmax(1)
            boxes[:, number, low], boxes[:, number, low + 2] = (first + last) / 2 / size, (last - first) / size
    boxes = np.take_along_axis(boxes, owner.reshape(count, -1)[..., None], 1)
    outline = (labels_IHW > 0).reshape(count, GRID, 7, 2, GRID, 7, 2).mean((3, 6), dtype=np.float32)
    outline = outline.transpose(0, 1, 3, 2, 4).reshape(count, GRID * GRID, 49)
    steps = (np.arange(FINE) * size // FINE) + 1
    fine = labels_IHW[:, steps][:, :, steps].astype(np.int64)
    nouns = np.concatenate([np.full((count, 1), len(NOUNS)), attributes_IK3[:, :, 0].astype(np.int64)], 1)
    fine_noun = np.take_along_axis(nouns, fine.reshape(count, -1), 1).reshape(fine.shape)
    fine_noun = np.where(fine_noun < 0, len(NOUNS), fine_noun)
    arrays = (noun, colour, texture, boxes, outline, covered.reshape(count, -1), fine_noun)
    return DenseTargets(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def augmented(bank: SceneBank, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images and instance maps of the rows with a random flip and transpose each."""
    images, labels = bank.images[rows], bank.labels[rows]
    for place in range(len(rows)):
        if rng.random() < 0.5:
            images[place], labels[place] = images[place, :, ::-1].copy(), labels[place, :, ::-1].copy()
        if rng.random() < 0.5:
            images[place], labels[place] = images[place].transpose(1, 0, 2).copy(), labels[place].T.copy()
    return images, labels


def to_pixel_values(images_IHW3: np.ndarray) -> Tensor:
    """Normalised model input (I, 3, H, W) of uint8 images."""
    return torch.from_numpy(images_IHW3).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def cosine(step: int, total: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def train_vision(
    model: Sam3Model,
    heads: DenseHeads,
    bank: SceneBank,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
    snapshot: Snapshot | None = None,
) -> None:
    """Train the vision tower and the temporary heads in place, from the snapshot's step to ``steps``."""
    parameters = [*model.vision_encoder.parameters(), *heads.parameters()]
    decayed = [p for p in parameters if p.dim() > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    first_step = snapshot.load(optimizer) if snapshot else 0
    rng = np.random.default_rng([seed, first_step])
    model.train()
    started = time.time()
    seen: dict[str, float] = {}
    for step in range(first_step, steps):
        rows = np.sort(rng.integers(0, len(bank), batch_size))
        images, labels = augmented(bank, rows, rng)
        targets = dense_targets(labels, np.asarray(bank.attributes[rows]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine(step, steps, 200)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.vision_encoder(to_pixel_values(images))
            losses = heads.losses(output.last_hidden_state, output.fpn_hidden_states[:-1], targets)
        loss = cast(Tensor, sum(losses.values()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        for name, value in losses.items():
            seen[name] = seen.get(name, 0.0) + value.item()
        if (step + 1) % 200 == 0:
            means = " ".join(f"{name} {value / 200:.3f}" for name, value in seen.items())
            log(f"vision step {step + 1}/{steps} {time.time() - started:.0f}s {means}")
            seen = {}
            if snapshot:
                snapshot.save(step + 1, optimizer)
