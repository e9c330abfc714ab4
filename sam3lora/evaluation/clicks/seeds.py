"""What a prompt found, matched to the objects that a user corrects from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from sam3lora.engine.clicks.interaction import Seed, SeedKind
from sam3lora.engine.mask_codes import Rle, rle_area_px
from sam3lora.engine.selection import SmallDetections
from sam3lora.evaluation.clicks.true_objects import TrueObject
from sam3lora.evaluation.metrics.cgf1 import iou_matrix

SEED_IOU = 0.5
"""A detection that overlaps an object less than this shows another object, and the user starts from nothing."""


@dataclass(frozen=True)
class FoundObject:
    """A detection to start from: what it adds to the first clicks, and its mask at the image's size as RLE."""

    seed: Seed
    rle: Rle


def found_objects(
    objects: Sequence[TrueObject], detections: Mapping[str, SmallDetections], kind: SeedKind
) -> list[FoundObject | None]:
    """For each object the detection of its prompt that shows it; None where there is none.

    Detections and objects of a prompt are matched one to one for the greatest sum of mask IoUs, as for cgF1.

    Args:
        detections: Of the image, by prompt.

    Raises:
        NotFiniteError: An output of the model is NaN or infinite.
    """
    found: list[FoundObject | None] = [None] * len(objects)
    for prompt, small in detections.items():
        small.check_finite()
        mine = [number for number, one in enumerate(objects) if one.category.prompt == prompt]
        rles = [small.encode(row) for row in range(len(small.scores_N))]
        boxes = small.at_full_size(rles).boxes_xyxy
        seen = [row for row, rle in enumerate(rles) if rle_area_px(rle) > 0]
        iou_DN = iou_matrix([rles[row] for row in seen], [objects[number].rle for number in mine], "segm")
        for position, column in zip(*linear_sum_assignment(iou_DN, maximize=True), strict=True):
            if iou_DN[position, column] >= SEED_IOU:
                row = seen[position]
                assert small.mask_logits_NHW is not None
                x0, y0, x1, y1 = (float(value) for value in boxes[position])
                seed = Seed(torch.from_numpy(small.mask_logits_NHW[row]), (x0, y0, x1, y1), kind)
                found[mine[column]] = FoundObject(seed, rles[row])
    return found
