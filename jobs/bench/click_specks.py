"""What filling small holes and leaving out specks does to clicked masks and their boxes: docs/clicks.md.

    sam3lora data synth /tmp/drawn --domain base --num-train 1 --num-valid 40 --seed 77
    python -m jobs.bench.click_specks /tmp/drawn/valid 0 4 8 16 32

Clicks on all objects without a prompt, once for each limit of both areas, of which 0 is the first. Some two minutes
each on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from pycocotools import mask as coco_mask

from jobs.bench.scripts import run_script
from sam3lora.data.masks import encode_segmentation
from sam3lora.engine.clicks.mask_cleaning import MaskCleaning
from sam3lora.evaluation.ask.click_run import evaluate_clicks
from sam3lora.evaluation.clicks.asking import SHOWN_CLICKS
from sam3lora.evaluation.clicks.measure import ClickMetrics
from sam3lora.evaluation.clicks.meter import click_differences
from sam3lora.evaluation.clicks.settings import ClickEvaluation

REPORTED = ("noc_80", "noc_85", "noc_90", *(f"mean_iou_{clicks}" for clicks in SHOWN_CLICKS))
FAR_IOU = 0.9
"""Specks are far if the box around a mask has a lower IoU than this with the box around its largest part."""


def box_iou(first: Any, second: Any) -> float:
    """Of the boxes around two masks; 0 where one has no pixel."""
    boxes_xywh = np.array([coco_mask.toBbox(one) for one in (first, second)])
    has_area = bool((boxes_xywh[:, 2:] > 0).all())
    return float(coco_mask.iou(boxes_xywh[:1], boxes_xywh[1:], [0])[0, 0]) if has_area else 0.0


def largest_part(rle: dict[str, Any]) -> dict[str, Any]:
    """Of a mask that has a pixel; parts that meet at a corner are one."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(coco_mask.decode(rle), connectivity=8)
    return coco_mask.encode(np.asfortranarray(parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax(), dtype=np.uint8))


def has_far_speck(rle: dict[str, Any]) -> bool:
    return bool(coco_mask.area(rle)) and box_iou(rle, largest_part(rle)) < FAR_IOU


def measure(folder: Path, area: int) -> tuple[ClickMetrics, dict[str, float]]:
    """The metrics of clicks, and the boxes of what they made: mean IoU with the true box, share with a far speck."""
    settings = ClickEvaluation(start_from=None, cleaning=MaskCleaning(area, area))
    metrics = evaluate_clicks(folder, None, settings, model="tiny", device="cpu")
    true_rles = {
        (record["image_id"], number): encode_segmentation(one["segmentation"], (record["height"], record["width"]))
        for record in map(metrics.index.record, range(len(metrics.index)))
        for number, one in enumerate(record["annotations"])
    }
    found: dict[str, float] = {}
    for clicks in SHOWN_CLICKS:
        shown = [(fact.shown[clicks], true_rles[place]) for place, fact in metrics.clicks.facts.items()]
        found[f"box_iou_{clicks}"] = float(np.mean([box_iou(*pair) for pair in shown]))
        found[f"far_speck_{clicks}"] = float(np.mean([has_far_speck(rle) for rle, _ in shown]))
    return metrics, found


def main(
    folder: Annotated[Path, typer.Argument(help="Labelled images: a folder with its COCO file.")],
    areas: Annotated[
        list[int] | None, typer.Argument(help="Limits, each compared with the first; 0 and 8 if none is given.")
    ] = None,
) -> None:
    first: ClickMetrics | None = None
    for area in areas or [0, 8]:
        metrics, boxes = measure(folder, area)
        values = {name: metrics.alone[name].value for name in REPORTED} | boxes
        print(f"{area:4}", *(f"{name} {value:.3f}" for name, value in values.items()), flush=True)
        if first is None:
            first = metrics
        else:
            for name, one in click_differences(first.clicks.alone, metrics.clicks.alone, REPORTED).items():
                interval = "" if one.low is None else f" [{one.low:+.4f}, {one.high:+.4f}]"  # None of a single image
                print(f"     {name} {one.difference:+.4f}{interval}", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
