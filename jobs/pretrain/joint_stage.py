"""Stage two: train the whole detector on prompted scenes with SAM 3's own loss, the vision heads kept as helpers."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam3Model

from jobs.pretrain.bank import SceneBank
from jobs.pretrain.prompting import ScenePrompt, ask
from jobs.pretrain.snapshot import Snapshot
from jobs.pretrain.vision_stage import (
    FINE,
    GRID,
    PATCH,
    DenseHeads,
    augmented,
    cosine,
    dense_targets,
    to_pixel_values,
)
from sam3lora.losses import Criterion, LossSection, Normalizer, Predictions, Targets
from sam3lora.model.staged.forward import StagedSam3, VisionFeatures

LOCATING_SHARE = 0.3
TEXTURED_BOOST = 3.0
# Presence logits beyond +-5 are drawn back, so that an adapter needs few steps to teach that a word is there after all.
PRESENCE_LIMIT = 5.0
MASKED_QUERIES = 8  # the mask branch is the dearest part of a step at this size


class TokenHead(nn.Module):
    """A temporary head on the fused image tokens: does this patch show what the prompt asks for?"""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.belongs = nn.LayerNorm(width), nn.Linear(width, 1)

    def loss(self, fused_BSC: Tensor, share_BS: Tensor) -> Tensor:
        logits = self.belongs(self.norm(fused_BSC)).squeeze(-1).float()
        return F.binary_cross_entropy_with_logits(logits, share_BS, pos_weight=torch.tensor(3.0))


def scene_targets(labels_IHW: np.ndarray, questions: list[list[ScenePrompt]]) -> tuple[Targets, Tensor, Tensor, Tensor]:
    """Targets of all questions, the share of each patch they cover (B, 256), exemplar boxes and labels (B, 1, ...)."""
    size = labels_IHW.shape[1]
    steps = (np.arange(FINE) * size // FINE) + 1
    num, boxes, masks, shares, examples, labels = [], [], [], [], [], []
    for label_map, asked in zip(labels_IHW, questions, strict=True):
        fine = label_map[steps][:, steps]
        found: dict[int, np.ndarray] = {}
        for question in asked:
            for number in {*question.wanted, *(pointed for pointed, _ in question.exemplars)} - set(found):
                ys, xs = np.nonzero(label_map == number + 1)
                x0, y0, x1, y1 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
                found[number] = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], np.float32) / size
            num.append(len(question.wanted))
            boxes += [found[number] for number in question.wanted]
            masks += [fine == number + 1 for number in question.wanted]
            union = np.isin(label_map, [number + 1 for number in question.wanted])
            shares.append(union.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).reshape(-1))
            pointed = question.exemplars[0] if question.exemplars else None
            examples.append(found[pointed[0]] if pointed else np.full(4, -10, np.float32))
            labels.append(pointed[1] if pointed else -10)
    count = len(boxes)
    targets = Targets(
        num_B=torch.tensor(num),
        boxes_cxcywh_T4=torch.from_numpy(np.stack(boxes)) if count else torch.zeros(0, 4),
        masks_THW=torch.from_numpy(np.stack(masks)) if count else torch.zeros(0, FINE, FINE, dtype=torch.bool),
        mask_valid_T=torch.from_numpy(np.array([mask.any() for mask in masks], bool)),
    )
    share = torch.from_numpy(np.stack(shares).astype(np.float32))
    return targets, share, torch.from_numpy(np.stack(examples))[:, None], torch.tensor(labels)[:, None]


def train_joint(
    model: Sam3Model,
    heads: DenseHeads,
    token_head: TokenHead,
    banks: list[tuple[SceneBank, float]],
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor]],
    *,
    steps: int,
    images_per_step: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
    snapshot: Snapshot | None = None,
) -> None:
    """Train ``model`` in place, from the snapshot's step to ``steps``.

    ``heads`` and ``token_head`` are temporary; ``banks`` are scenes with the probability to draw from each.
    """
    loss = LossSection(bbox=5, giou=2, ce=20, presence=10, mask=100, dice=5, semantic=10, semantic_dice=5, o2m=1)
    criterion = Criterion(loss, pad_n_queries=None, touch_unused=False)
    staged = StagedSam3(model)
    slow = [p for n, p in model.named_parameters() if n.startswith("vision_encoder.backbone")]
    slow_ids = {id(p) for p in slow}
    fast = [p for p in (*model.parameters(), *token_head.parameters(), *heads.parameters()) if id(p) not in slow_ids]
    optimizer = torch.optim.AdamW(
        [{"params": slow, "scale": 0.3}, {"params": fast, "scale": 1.0}], betas=(0.9, 0.98), weight_decay=0.02
    )
    first_step = snapshot.load(optimizer) if snapshot else 0
    rng = np.random.default_rng([seed, first_step])
    model.train()
    started = time.time()
    seen: dict[str, float] = {}
    right: list[float] = []
    odds = np.array([share for _, share in banks]) / sum(share for _, share in banks)
    visible = {id(bank): bank.fully_visible_rows() for bank, _ in banks}
    # Few scenes allow a texture prompt: they are drawn more often, else textures are the last thing to be learned.
    chances = {}
    for bank, _ in banks:
        weights_N = 1 + (TEXTURED_BOOST - 1) * bank.textured_rows()[visible[id(bank)]]
        chances[id(bank)] = weights_N / weights_N.sum()
    for step in range(first_step, steps):
        # The one-to-many branch teaches where objects are; later the steps go into telling look-alikes apart.
        locating = step < LOCATING_SHARE * steps
        bank = banks[rng.choice(len(banks), p=odds)][0]
        rows = np.sort(rng.choice(visible[id(bank)], images_per_step, p=chances[id(bank)]))
        images, labels = augmented(bank, rows, rng)
        with_boxes = rng.random() < 0.25
        questions = [
            ask(bank.objects(row), rng, negatives=2 if locating else 3, exemplars=with_boxes) for row in rows.tolist()
        ]
        # Flips move pixels, not object numbers: what each question wants still holds.
        targets, share_BS, boxes_B14, labels_B1 = scene_targets(labels, questions)
        prompts = [question.prompt for asked in questions for question in asked]
        distinct = list(dict.fromkeys(prompts))
        text_index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        image_index = torch.arange(images_per_step).repeat_interleave(len(questions[0]))
        with torch.autocast("cpu", torch.bfloat16):
            vision_output = model.vision_encoder(to_pixel_values(images))
            vision = VisionFeatures.from_output(vision_output)
            text = staged.encode_text(*tokenize(distinct))
            found = staged.detect(
                vision,
                text,
                image_index,
                text_index,
                boxes_cxcywh_BN4=boxes_B14 if with_boxes else None,
                box_labels_BN=labels_B1 if with_boxes else None,
                one_to_many=locating,
            )
            positive = (targets.num_B > 0).nonzero().squeeze(1)
            masked = positive[torch.from_numpy(rng.permutation(len(positive))[:MASKED_QUERIES])].sort().values
            mask_head = staged.mask_head(found, masked)
            keep = torch.isin(targets.query_index(), masked)
            targets.mask_valid_T &= keep
            dense = heads.losses(
                vision_output.last_hidden_state,
                vision.maps_ICHW,
                dense_targets(labels, np.asarray(bank.attributes[rows])),
            )
            token_loss = token_head.loss(found.encoder_hidden_BSC, share_BS)
        predictions = Predictions(
            logits_LBQ=found.logits_LBQ,
            boxes_cxcywh_LBQ4=found.boxes_cxcywh_LBQ4,
            presence_logits_LB=found.raw_presence_logits_LB,
            logits_o2m_LBQ=found.logits_o2m_LBQ,
            boxes_o2m_LBQ4=found.boxes_o2m_LBQ4,
            mask_logits=mask_head.branch_logits,
            semantic_logits=mask_head.semantic_logits,
        )
        normalizer = Normalizer(
            num_queries=len(prompts),
            num_boxes=max(1, len(targets.boxes_cxcywh_T4)),
            num_semantic=max(1, len(targets.query_index()[targets.has_mask_pixels()].unique())),
            scale=1.0,
        )
        output = criterion(predictions, targets, normalizer)
        # SAM 3's recipe gives absent prompts no classification loss; a small model learns to tell look-alikes apart
        # sooner when every object query hears "not this" as well.
        absent = targets.num_B == 0
        refused = found.logits_LBQ[:, absent].float()
        refusal = (refused.sigmoid().square() * F.softplus(refused)).mean(2).sum() / len(prompts)
        excess = (found.raw_presence_logits_LB.float().abs() - PRESENCE_LIMIT).clamp(min=0).square().mean()
        total = output.total + 10 * refusal + 2.5 * token_loss + 0.7 * sum(dense.values()) + excess
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"] * cosine(step, steps, 150)
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss is {total.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_([*slow, *fast], 1.0)
        optimizer.step()
        helpers = {"token": token_loss, "refusal": refusal, "dense": sum(dense.values()), "noun": dense["noun"]}
        terms = {**output.terms, **helpers}
        for name, value in terms.items():
            seen[name] = seen.get(name, 0.0) + float(torch.as_tensor(value).detach())
        right.append(((found.presence_logits_LB[-1] > 0) == (targets.num_B > 0)).float().mean().item())
        if (step + 1) % 200 == 0:
            means = " ".join(f"{name} {value / 200:.3f}" for name, value in seen.items())
            log(f"joint step {step + 1}/{steps} {time.time() - started:.0f}s presence {np.mean(right):.3f} {means}")
            seen, right = {}, []
            if snapshot:
                snapshot.save(step + 1, optimizer)
