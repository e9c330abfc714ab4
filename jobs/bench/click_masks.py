"""Simulated clicks on the objects of a large image: masks as run-length codes, and as arrays of the image's size.

No model takes part: masks that get better with every click are drawn. What is measured is deciding on each click, and
the IoU that it leads to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from jobs.bench.processes import Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from sam3lora.engine.clicks.click import Click
from sam3lora.engine.mask_codes import Rle, encode_logits
from sam3lora.evaluation.clicks.simulated_user import ClickedMask, SimulatedUser, run_objects

MASK_SIDE = 288
Trace = list[tuple[list[float], list[Click]]]
"""Of each object the IoU before any click and after each, and the clicks."""


@dataclass(frozen=True)
class ClickWorkload:
    """Objects on a grid, wobbly discs that fill about a third of their cells.

    Attributes:
        megapixels: Of an image of 4 x 3.
        num_clicks: On each object.
    """

    megapixels: float = 20
    num_objects: int = 12
    num_clicks: int = 3

    @property
    def size_hw(self) -> tuple[int, int]:
        height = round(math.sqrt(0.75e6 * self.megapixels))
        return height, round(1e6 * self.megapixels / height)

    def mask(self, number: int, num_clicks: int | None) -> Rle:
        """Of an object: its true mask (None), or what a model would answer to so many clicks."""
        generator = np.random.default_rng([number, 0 if num_clicks is None else num_clicks])
        cells = math.ceil(math.sqrt(self.num_objects))
        y, x = (np.mgrid[:MASK_SIDE, :MASK_SIDE] + 0.5) / MASK_SIDE * cells - 0.5
        y, x = y - number // cells, x - number % cells
        distance = np.hypot(y, x) + 0.03 * np.sin((3 + number % 4) * np.arctan2(y, x))
        if num_clicks is not None:
            noise = generator.standard_normal((9 * cells, 9 * cells))
            distance = distance + 0.2 / num_clicks * cv2.resize(noise, (MASK_SIDE, MASK_SIDE))
        return encode_logits((0.33 - distance).astype(np.float32), self.size_hw)


def compare_click_masks(workload: ClickWorkload, *, repeats: int = 1) -> BenchReport:
    """Time (the median of the rounds) and memory of both ways, each in a process of its own."""
    works = {name: Work(make_round, {"name": name, "workload": workload}) for name in WAYS}
    found = measure_in_turns(works, rounds=repeats, warm_ups=0)
    ours, plain = (found[name].results[-1] for name in WAYS)
    return BenchReport(
        title=f"{workload.num_clicks} clicks on each of {workload.num_objects} objects of an image of "
        f"{workload.megapixels:g} megapixels",
        ways=[Timing(name, measured.median, measured.extra_mib) for name, measured in found.items()],
        facts={"mean IoU at the end": round(float(np.mean([ious[-1] for ious, _ in ours])), 4), "equal": ours == plain},
    )


def make_round(name: str, workload: ClickWorkload) -> Round:
    """One way, on the same masks in every round."""
    truths = [workload.mask(number, None) for number in range(workload.num_objects)]
    answers = [
        [workload.mask(number, clicks) for clicks in range(1, workload.num_clicks + 1)]
        for number in range(workload.num_objects)
    ]
    return partial(WAYS[name], truths, answers)


def click_on_codes(truths: Sequence[Rle], answers: Sequence[Sequence[Rle]]) -> Trace:
    """Ours."""
    users = [SimulatedUser(truth, max_clicks=len(answers[0])) for truth in truths]
    runs = run_objects(users, lambda asked: [ClickedMask(answers[number][len(clicks) - 1]) for number, clicks in asked])
    return [(run.ious.tolist(), list(run.clicks)) for run in runs]


def click_on_arrays(truths: Sequence[Rle], answers: Sequence[Sequence[Rle]]) -> Trace:
    """The plain way: all objects click in turn, and their masks are whole arrays."""
    true_masks = [decoded(truth) for truth in truths]
    found = [np.zeros_like(mask) for mask in true_masks]
    traces: Trace = [([plain_iou(*pair)], []) for pair in zip(true_masks, found, strict=True)]
    for number_of_click in range(len(answers[0])):
        for number, truth_HW in enumerate(true_masks):
            ious, clicks = traces[number]
            click = plain_next_click(truth_HW, found[number], clicks)
            if click is None:
                ious.append(ious[-1])
                continue
            clicks.append(click)
            found[number] = decoded(answers[number][number_of_click])
            ious.append(plain_iou(truth_HW, found[number]))
    return traces


WAYS = {"sam3lora": click_on_codes, "whole masks": click_on_arrays}


def decoded(rle: Rle) -> np.ndarray:
    return coco_mask.decode(rle).astype(bool)


def plain_iou(truth_HW: np.ndarray, found_HW: np.ndarray, ignored_HW: np.ndarray | None = None) -> float:
    """`mask_iou` of bool arrays."""
    valid_HW = True if ignored_HW is None else ~ignored_HW
    union = int(((truth_HW | found_HW) & valid_HW).sum())
    return int((truth_HW & found_HW & valid_HW).sum()) / union if union else 1.0


def plain_next_click(
    truth_HW: np.ndarray, found_HW: np.ndarray, clicked: Sequence[Click] = (), ignored_HW: np.ndarray | None = None
) -> Click | None:
    """`next_click` of bool arrays."""
    missed_HW, wrong_HW = truth_HW & ~found_HW, found_HW & ~truth_HW
    if ignored_HW is not None:
        missed_HW, wrong_HW = missed_HW & ~ignored_HW, wrong_HW & ~ignored_HW
    deepest = {}
    for label, error_HW in ((1, missed_HW), (0, wrong_HW)):
        y_N, x_N = np.flatnonzero(error_HW.any(axis=1)), np.flatnonzero(error_HW.any(axis=0))
        if not len(y_N):
            deepest[label] = (0.0, 0, 0)
            continue
        top, left = int(y_N[0]), int(x_N[0])
        padded = np.pad(error_HW[top : y_N[-1] + 1, left : x_N[-1] + 1], 1).astype(np.uint8)
        depth_hw = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        # Squares are whole numbers; without rounding, equal depths differ in the last bit.
        np.rint(np.square(depth_hw, out=depth_hw), out=depth_hw)
        for click in clicked:
            x, y = int(click.x) - left, int(click.y) - top
            if 0 <= x < depth_hw.shape[1] and 0 <= y < depth_hw.shape[0]:
                depth_hw[y, x] = 0
        y, x = divmod(int(depth_hw.argmax()), depth_hw.shape[1])
        deepest[label] = (float(depth_hw[y, x]), left + x, top + y)
    if max(deepest[0][0], deepest[1][0]) == 0:
        return None
    label = int(deepest[1][0] > deepest[0][0])
    return Click(*deepest[label][1:], label)
