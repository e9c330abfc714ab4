"""Training of the click head on drawn scenes: first to read masks, then clicks, boxes and corrections.

What to make of a mask prompt is hardly learned beside clicks and boxes: the mask stays a faint hint. A first phase
therefore shows little but masks, right and wrong ones, and so do many steps later. The last steps have a lower learning
rate and longer interactions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.pretrain.click_scenes import ClickScenes
from jobs.pretrain.snapshot import Snapshot
from jobs.pretrain.vision_stage import cosine
from sam3lora.config.clicks import StartShares
from sam3lora.engine.clicks.prompt import drawn_mask_logits
from sam3lora.losses.clicks import CLICK_WEIGHTS, ClickCriterion, ClickLossOutput
from sam3lora.losses.focal_dice import resize
from sam3lora.model.clicks.head import ClickHead
from sam3lora.training.clicks.asking import ask, best_masks
from sam3lora.training.clicks.sampling import Prompts, draw_start, next_clicks, start_prompts, wrong_masks

WEIGHTS = dict(CLICK_WEIGHTS) | {"click_dice": 3.0, "click_object": 0.1}
LATER = StartShares(click=0.35, box=0.15, mask=0.3, mask_and_box=0.2)
LEARNING_RATES = {"neck.": 0.3, "prompt_encoder.mask_embed.": 5.0}
"""Learning rates of parts as multiples of the others'."""
RIGHT_MASK = 0.5
"""Share of the starts with a mask that show the right one."""
LAST_MASK_SHARE, LAST_RATE = 0.5, 0.3
"""Share of the last steps that show masks, and the largest of their learning rates as a multiple of the peak."""
MASK_ALONE = 0.25
"""Share of the starts with the right mask, and no box, that come without a click."""


@dataclass(frozen=True)
class ClickStage:
    """Everything that decides what the stage learns.

    The first `mask_steps` of the `steps`, and later this share of them, show masks. `last_steps` follow, at a lower
    learning rate and with more clicks on an object. A step has up to `images` x `objects` objects.
    """

    steps: int = 6500
    mask_steps: int = 600
    mask_share: float = 0.5
    last_steps: int = 1200
    images: int = 8
    objects: int = 3
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    side: int = 112
    seed: int = 0

    def shows_masks(self, step: int, rng: np.random.Generator) -> bool:
        """Whether a step is about masks."""
        share = self.mask_share if step < self.steps else LAST_MASK_SHARE
        return step < self.mask_steps or rng.random() < share

    def rate(self, step: int) -> float:
        """Factor of the learning rate."""
        if step < self.steps:
            return cosine(step, self.steps, 100)
        last = step - self.steps
        return LAST_RATE * min(1, (last + 1) / 50) * (1 - last / self.last_steps)

    def num_predictions(self, step: int, rng: np.random.Generator) -> int:
        """Predictions for each object in a step that is not about masks: 3, then 4, 3 to 8, and 3 to 12 in the end."""
        if step < 0.5 * self.steps:
            return 3
        if step < 0.6 * self.steps:
            return 4
        return int(rng.integers(3, 9 if step < self.steps else 13))


def train_clicks(
    head: ClickHead,
    scenes: Sequence[tuple[ClickScenes, float]],
    stage: ClickStage,
    *,
    log: Callable[[str], None] = print,
    snapshot: Snapshot | None = None,
    check: Callable[[], str] | None = None,
    check_every: int = 500,
) -> None:
    """Train a head in place, from the snapshot's step on.

    Args:
        scenes: With the probability that a step takes its images from them.
        check: Called now and then; what it returns is logged.
    """
    groups = _groups(head, stage)
    learned = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))
    first = snapshot.load(optimizer) if snapshot else 0
    rng = np.random.default_rng([stage.seed, first])
    generator = torch.Generator().manual_seed(stage.seed + first)
    criterion, started = ClickCriterion(WEIGHTS), time.time()
    seen: list[tuple[float, float, float]] = []
    head.train()
    total = stage.steps + stage.last_steps
    for step in range(first, total):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * stage.rate(step)
        of_scenes = scenes[rng.choice(len(scenes), p=[share for _, share in scenes])][0]
        rows = np.sort(rng.choice(len(of_scenes), stage.images, replace=False))
        image_N, masks_NHW = of_scenes.objects(rows, rng, stage.objects)
        pixels = masks_NHW.shape[1] // stage.side
        y, x = rng.integers(pixels, size=2)  # always the same pixel of a block would shift all masks by half a pixel
        truth_Nhw = masks_NHW[:, y::pixels, x::pixels]
        shows_masks = stage.shows_masks(step, rng)
        number = 1 if shows_masks else stage.num_predictions(step, rng)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            features = head.embed(of_scenes.tokens_ISC[torch.from_numpy(rows)].float()).of_objects(image_N)
            prompts = _start(shows_masks, masks_NHW, truth_Nhw, image_N, head, rng, generator)
            losses: list[ClickLossOutput] = []
            for turn in range(number):
                output = ask(head, features, prompts)
                losses.append(criterion(output.logits_NMmm, output.iou_NM, output.object_N, truth_Nhw, len(truth_Nhw)))
                if turn + 1 < number:
                    logits_Nmm = best_masks(output)
                    found_Nhw = resize(logits_Nmm, truth_Nhw.shape[1:]) > 0
                    clicks = next_clicks(truth_Nhw, found_Nhw, head.input_side, generator)
                    prompts = prompts.then(*clicks, logits_Nmm)
        loss = torch.stack([one.total for one in losses]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        seen.append((loss.item(), losses[0].iou_NM.amax(1).mean().item(), losses[-1].iou_NM.amax(1).mean().item()))
        if (step + 1) % 100 == 0:
            mean, first_iou, last_iou = np.mean(seen, axis=0)
            ious = f"iou {first_iou:.3f} to {last_iou:.3f}"
            log(f"click step {step + 1}/{total} {time.time() - started:.0f}s loss {mean:.3f} {ious}")
            seen = []
        if (step + 1) % check_every == 0 or step + 1 == total:
            if snapshot:
                snapshot.save(step + 1, optimizer)
            if check:
                head.eval()
                log(check())
                head.train()


def _groups(head: ClickHead, stage: ClickStage) -> list[dict[str, Any]]:
    """Matrices with weight decay and all else without, each part with its learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in head.named_parameters():
        share = next((share for part, share in LEARNING_RATES.items() if name.startswith(part)), 1.0)
        peak = stage.learning_rate * share
        decay = stage.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": of, "peak": peak, "weight_decay": decay} for (peak, decay), of in groups.items()]


def _start(
    shows_masks: bool,
    masks_NHW: Tensor,
    truth_Nhw: Tensor,
    image_N: Tensor,
    head: ClickHead,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Prompts:
    """The first prompts: of the first phase masks, with or without the box and a click."""
    shares = StartShares(click=0.05, box=0.05, mask=0.6, mask_and_box=0.3) if shows_masks else LATER
    start = draw_start(shares, generator)
    prompts = start_prompts(start, truth_Nhw, head.input_side, generator, image_N)
    if prompts.masks_Nhw is None:
        return prompts
    is_right = rng.random() < (0.9 if shows_masks else RIGHT_MASK)
    shown_Nhw = truth_Nhw if is_right else wrong_masks(truth_Nhw, generator, image_N)
    points_N12, labels_N1 = next_clicks(truth_Nhw, shown_Nhw, head.input_side, generator, from_object=0.3)
    if is_right and start == "mask" and rng.random() < MASK_ALONE:
        points_N12, labels_N1 = points_N12[:, :0], labels_N1[:, :0]
    if is_right:  # of the full size and a known scale: its border can then be drawn finer than its pixels
        logits_Nmm = drawn_mask_logits(masks_NHW, head.mask_side)
    else:
        logits_Nmm = drawn_mask_logits(shown_Nhw, head.mask_side, float(rng.uniform(4, 16)))
    return replace(prompts, points_Nk2=points_N12, labels_Nk=labels_N1, masks_Nhw=logits_Nmm)
