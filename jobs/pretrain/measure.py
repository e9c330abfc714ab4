"""How well a base model reads prompts on held-out scenes: mask mAP, presence, look-alike pairs, unknown words.

mAP alone does not show whether a model listens to the prompt: one that returns every object for any prompt can still
score well where the prompt's objects are most of the scene. The pair table asks directly: in an image that holds both
the named thing and another one, which of the two is scored higher, and does the other stay below 0.5?
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.pretrain.bank import SceneBank
from jobs.pretrain.prompting import ask
from jobs.pretrain.vision_stage import to_pixel_values
from jobs.pretrain.words import HELD_OUT_ABSENT
from sam3lora.data.synth.scenes import Concept, concepts_of
from sam3lora.evaluation.metrics.coco_map import coco_map
from sam3lora.model.staged.forward import StagedSam3

MASK_SIZE = 112


@dataclass
class PromptDetections:
    """Detections of one prompt: scores (Q,), masks (Q, 112, 112) bool, presence in [0, 1]."""

    scores: np.ndarray
    masks: np.ndarray
    presence: float


@dataclass
class TinyReport:
    """Figures of a base model on held-out scenes. ``pairs``: kind -> (pairs, share in which the named thing is scored
    above the other, share in which the other stays below 0.5). A mAP is None where nothing was to be found."""

    num_images: int
    num_prompts: int
    map: float | None
    map_50: float | None
    presence_accuracy: float
    by_kind: dict[str, dict[str, float | None]]
    pairs: dict[str, tuple[int, float, float]]
    unknown_absent: float
    unknown_prompts: int
    details: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def answer(
    staged: StagedSam3, tokenize: Callable[[list[str]], tuple[Tensor, Tensor]], image: np.ndarray, prompts: list[str]
) -> list[PromptDetections]:
    """All prompts of one image, with one vision pass."""
    text = staged.encode_text(*tokenize(prompts))
    vision = staged.encode_images(to_pixel_values(image[None]))
    rows = torch.arange(len(prompts))
    found = staged.detect(vision, text, torch.zeros_like(rows), rows)
    head = staged.mask_head(found, rows)
    queries = found.logits_LBQ.shape[-1]
    logits = head.instance_logits(rows.repeat_interleave(queries), torch.arange(queries).repeat(len(prompts)))
    masks = F.interpolate(logits[:, None].float(), size=(MASK_SIZE, MASK_SIZE), mode="bilinear")[:, 0] > 0
    masks_PQHW = masks.view(len(prompts), queries, MASK_SIZE, MASK_SIZE).numpy()
    scores, presence = found.scores_BQ().numpy(), found.presence_logits_LB[-1].float().sigmoid().numpy()
    return [PromptDetections(scores[row], masks_PQHW[row], float(presence[row])) for row in range(len(prompts))]


def measure(
    staged: StagedSam3,
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor]],
    bank: SceneBank,
    *,
    num_images: int = 250,
    seed: int = 5,
) -> TinyReport:
    """Prompt every image with two present and two absent concepts (mAP, presence), with a concept of each object in
    turn (pairs), and with words the model never saw."""
    rng = np.random.default_rng(seed)
    truths: list[dict] = []
    detections: list[dict] = []
    units: dict[str, list[int]] = defaultdict(list)
    right: dict[str, list[bool]] = defaultdict(list)
    pairs: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    refused = []
    rows = bank.fully_visible_rows()[:num_images]
    for row in rows.tolist():
        objects, image = bank.objects(row), np.array(bank.images[row])
        small = [thing.mask_HW[1::2, 1::2] for thing in objects]
        questions = ask(objects, rng)
        pair_questions = _pair_questions(objects, rng)
        unknown = [HELD_OUT_ABSENT[rng.integers(len(HELD_OUT_ABSENT))] for _ in range(2)]
        prompts = [q.prompt for q in questions] + [concept.prompt for concept, _, _ in pair_questions] + unknown
        answers = answer(staged, tokenize, image, prompts)
        for question, reply in zip(questions, answers, strict=False):
            unit = len(right["all"]) + 1
            right["all"].append((reply.presence > 0.5) == bool(question.wanted))
            right[question.kind].append(right["all"][-1])
            units[question.kind].append(unit)
            truths += [{"image_id": unit, "mask": small[number]} for number in question.wanted]
            detections += [
                {"image_id": unit, "mask": mask, "score": float(score)}
                for mask, score in zip(reply.masks, reply.scores, strict=True)
            ]
        for (concept, wanted, other), reply in zip(pair_questions, answers[len(questions) :], strict=False):
            named, distractor = (_score_of(reply, [small[n] for n in numbers]) for numbers in (wanted, other))
            pairs[concept.kind].append((named > distractor, distractor < 0.5))
        refused += [bool((reply.scores < 0.5).all()) for reply in answers[len(answers) - len(unknown) :]]
    overall = _unit_map(truths, detections, range(1, len(right["all"]) + 1))
    by_kind: dict[str, dict[str, float | None]] = {}
    for kind in sorted(units):
        scores = _unit_map(truths, detections, units[kind])
        by_kind[kind] = {**scores, "presence_accuracy": float(np.mean(right[kind])), "prompts": len(units[kind])}
    return TinyReport(
        num_images=len(rows),
        num_prompts=len(right["all"]),
        map=overall["map"],
        map_50=overall["map_50"],
        presence_accuracy=float(np.mean(right["all"])),
        by_kind=by_kind,
        pairs={kind: _pair_shares(values) for kind, values in sorted(pairs.items())},
        unknown_absent=float(np.mean(refused)),
        unknown_prompts=len(refused),
    )


def _pair_questions(objects, rng: np.random.Generator) -> list[tuple[Concept, list[int], list[int]]]:
    """(concept, objects it names, a look-alike's objects): for each kind one concept of the image and one object that
    the concept does not name, with all objects like it."""
    concepts = list(dict.fromkeys(c for thing in objects for c in concepts_of(thing) if not c.is_ambiguous_in(objects)))
    questions = []
    for kind in dict.fromkeys(concept.kind for concept in concepts):
        of_kind = [concept for concept in concepts if concept.kind == kind]
        concept = of_kind[rng.integers(len(of_kind))]
        wanted = [number for number, thing in enumerate(objects) if concept.matches(thing)]
        others = [number for number in range(len(objects)) if number not in wanted]
        if others:
            example = objects[others[rng.integers(len(others))]]
            alike = [n for n in others if (objects[n].noun, objects[n].colour) == (example.noun, example.colour)]
            questions.append((concept, wanted, alike))
    return questions


def _pair_shares(values: list[tuple[bool, bool]]) -> tuple[int, float, float]:
    above, below = np.mean(values, 0).tolist()
    return len(values), above, below


def _score_of(reply: PromptDetections, masks: list[np.ndarray]) -> float:
    """The highest score of a detection that covers one of the objects (mask IoU of at least 0.5); 0 if none does."""
    best = 0.0
    flat = reply.masks.reshape(len(reply.masks), -1).astype(np.float32)
    for mask in masks:
        target = mask.reshape(-1).astype(np.float32)
        intersection = flat @ target
        iou = intersection / np.maximum(flat.sum(1) + target.sum() - intersection, 1)
        hits = reply.scores[iou >= 0.5]
        best = max(best, float(hits.max(initial=0.0)))
    return best


def _unit_map(truths: list[dict], detections: list[dict], units) -> dict[str, float | None]:
    """Pooled COCO mask AP where every (image, prompt) is an image of its own; absent prompts are empty images."""
    from pycocotools import mask as rle

    wanted = set(units)
    size = [MASK_SIZE, MASK_SIZE]

    def encode(mask: np.ndarray) -> dict:
        return rle.encode(np.asfortranarray(mask.astype(np.uint8)))

    images = [{"id": unit, "height": size[0], "width": size[1]} for unit in sorted(wanted)]
    annotations = [
        {"id": number, "image_id": t["image_id"], "category_id": 1, "segmentation": encode(t["mask"]), "iscrowd": 0,
         "area": int(t["mask"].sum()), "bbox": [0, 0, 1, 1]}
        for number, t in enumerate(truths, 1) if t["image_id"] in wanted
    ]  # fmt: skip
    results = [
        {"image_id": d["image_id"], "category_id": 1, "segmentation": encode(d["mask"]), "score": d["score"]}
        for d in detections
        if d["image_id"] in wanted
    ]
    ground_truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "prompt"}]}
    scores = coco_map(ground_truth, results, bbox=False)
    return {"map": scores.map, "map_50": scores.map_50}
