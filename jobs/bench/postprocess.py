"""From mask logits to the run-length codes of the kept detections: time and memory of two ways."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from jobs.bench.processes import Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from sam3lora.config.post_processing import PostProcessing
from sam3lora.engine.mask_codes import Rle, encode_logits
from sam3lora.engine.postprocess import select
from sam3lora.errors import UserError

POST = PostProcessing(threshold=0.5, nms="mask", nms_iou=0.9, max_detections=1000)
"""Nearly all above the threshold stay, and are encoded."""

CHUNK = 10
"""Masks that the plain way enlarges at a time: all at once they would take 9 GB."""


@dataclass(frozen=True)
class Workload:
    """What the model says about one image.

    Attributes:
        kind: "blobs" are objects of 0.1 to 10 % of the image, "large" ones of 20 to 60 % with ragged outlines.
        num_masks: Object queries.
        mask_side: Of the logits.
        size_hw: Of the image in pixels.
        num_kept: How many reach the threshold; None is all.
        seed: Of the shapes.
    """

    kind: str = "blobs"
    num_masks: int = 200
    mask_side: int = 288
    size_hw: tuple[int, int] = (2000, 3000)
    num_kept: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_kept is not None and not 0 < self.num_kept <= self.num_masks:
            raise UserError(f"kept masks must be 1 to {self.num_masks}, got {self.num_kept}")
        if self.kind not in _SHARES:
            raise UserError(f"masks must be {' or '.join(_SHARES)}, got {self.kind!r}")

    def draw(self) -> tuple[Tensor, Tensor]:
        """Scores (N,) by descending order and mask logits (N, h, w): wobbly discs anywhere in the image."""
        generator = np.random.default_rng(self.seed)
        low, high = _SHARES[self.kind]
        ragged = 3.0 if self.kind == "large" else 0.3
        y, x = (np.mgrid[: self.mask_side, : self.mask_side] + 0.5) / self.mask_side
        logits = np.empty((self.num_masks, self.mask_side, self.mask_side), dtype=np.float32)
        for mask in logits:
            radius = np.sqrt(np.exp(generator.uniform(np.log(low), np.log(high))) / np.pi)
            centre_y, centre_x = generator.uniform(0, 1, 2)
            wobble = 1 + 0.15 * np.sin(
                generator.integers(2, 7) * np.arctan2(y - centre_y, x - centre_x) + generator.uniform(0, 2 * np.pi)
            )
            mask[:] = 40 * (radius * wobble - np.hypot(y - centre_y, x - centre_x))
            mask += ragged * generator.standard_normal(mask.shape, dtype=np.float32)
        num_kept = self.num_masks if self.num_kept is None else self.num_kept
        scores = [torch.linspace(0.99, POST.threshold, num_kept), torch.linspace(0.4, 0.01, self.num_masks - num_kept)]
        return torch.cat(scores), torch.from_numpy(logits)


_SHARES = {"blobs": (0.001, 0.1), "large": (0.2, 0.6)}


def compare_postprocessing(workload: Workload, *, repeats: int = 3) -> BenchReport:
    """Time (the median of the rounds) and memory of both ways, each in a process of its own."""
    works = {name: Work(make_round, {"name": name, "workload": workload}) for name in WAYS}
    found = measure_in_turns(works, rounds=repeats, warm_ups=0)
    ours, plain = (found[name].results[-1] for name in WAYS)
    height, width = workload.size_hw
    return BenchReport(
        title=f"{workload.num_masks} {workload.kind} of which {workload.num_kept or 'all'} are kept, "
        f"{workload.mask_side} x {workload.mask_side} logits, to {width} x {height} pixels",
        ways=[Timing(name, measured.median, measured.extra_mib) for name, measured in found.items()],
        facts={
            "kept, sam3lora": len(ours),
            "kept, plain": len(plain),
            "mask pixels that differ": _difference(ours, plain),
        },
    )


def make_round(name: str, workload: Workload) -> Round:
    """One way, on the same masks in every round."""
    scores_N, logits_NHW = workload.draw()
    WAYS[name](scores_N[:2], logits_NHW[:2], (16, 16))  # what is loaded at first use is no cost of the work
    return partial(WAYS[name], scores_N, logits_NHW, workload.size_hw)


def encode_ours(scores_N: Tensor, logits_NHW: Tensor, size_hw: tuple[int, int]) -> list[Rle]:
    """Suppression on the small masks, then run-length codes straight from the small logits."""
    num = int((scores_N >= POST.threshold).sum())
    kept = select(scores_N[:num], torch.zeros(num, 4), logits_NHW[:num], POST).mask_logits_NHW
    assert kept is not None
    return [encode_logits(logits, size_hw) for logits in kept.numpy()]


def encode_plain(scores_N: Tensor, logits_NHW: Tensor, size_hw: tuple[int, int]) -> list[Rle]:
    """The plain way: every mask at the size of the image, the threshold, suppression pair by pair, then the codes.

    Masks are kept as booleans, and compared as the model made them: both spare what many a script spends.
    """
    probabilities = logits_NHW.sigmoid()
    masks = np.empty((len(scores_N), *size_hw), dtype=bool)
    for start in range(0, len(masks), CHUNK):
        large = F.interpolate(probabilities[None, start : start + CHUNK], size_hw, mode="bilinear")[0]
        masks[start : start + CHUNK] = (large > 0.5).numpy()
    small = (logits_NHW > 0).numpy()
    kept: list[int] = []
    for candidate in torch.nonzero(scores_N >= POST.threshold).flatten().tolist():
        if all(_iou(small[better], small[candidate]) <= POST.nms_iou for better in kept):
            kept.append(candidate)
    rles = [coco_mask.encode(np.asfortranarray(masks[row].astype(np.uint8))) for row in kept]
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in rles]


WAYS = {"sam3lora": encode_ours, "torch and pycocotools": encode_plain}


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = np.logical_or(first, second).sum()
    return np.logical_and(first, second).sum() / union if union else 0.0


def _difference(ours: list[Rle], plain: list[Rle]) -> float | None:
    """Share of pixels on which the masks of both ways differ; None if they kept different numbers."""
    if len(ours) != len(plain) or not ours:
        return None
    shares = []
    for first, second in zip(ours, plain, strict=True):
        height, width = first["size"]
        common = coco_mask.area(coco_mask.merge([first, second], intersect=True))
        shares.append((coco_mask.area(first) + coco_mask.area(second) - 2 * common) / (height * width))
    return round(float(np.mean(shares)), 6)
