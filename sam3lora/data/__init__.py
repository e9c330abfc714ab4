"""Data sets: COCO folders, checks, conversion, splits, prompts, decoding, and the pipeline of training batches.

Nothing here imports torch except `sam3lora.data.batch`, so that data workers stay light.
"""

from __future__ import annotations

from sam3lora.data.coco import CocoIndex, merge_names
from sam3lora.data.images import ImageError, read_image, resize_image
from sam3lora.data.plan import BatchPlan, plan_epoch, plan_run, plan_validation
from sam3lora.data.prompts import Query, build_queries
from sam3lora.data.sample import DecodeSettings, rows_with_queries

__all__ = [
    "BatchPlan",
    "CocoIndex",
    "DecodeSettings",
    "ImageError",
    "Query",
    "build_queries",
    "merge_names",
    "plan_epoch",
    "plan_run",
    "plan_validation",
    "read_image",
    "resize_image",
    "rows_with_queries",
]
