"""How detections are made from scores and masks, and when they are measured."""

from __future__ import annotations

from pydantic import Field

from ._section import Section


class EvaluationSection(Section):
    """Post-processing and metrics."""

    every_epochs: int = Field(
        default=0,
        ge=0,
        description="Measure mAP every so many epochs and choose best/ by it; 0 = by validation loss only.",
    )
    prob_threshold: float = Field(
        default=0.3, ge=0, le=1, description="Lowest score (object x presence) that counts as a detection."
    )
    nms_iou: float = Field(
        default=0.7, gt=0, le=1, description="Of two masks of a prompt that overlap more, only the better one stays."
    )
    merge: bool = Field(default=False, description="Join overlapping masks instead of dropping them.")
    merge_iou: float = Field(default=0.15, gt=0, le=1, description="Overlap from which masks are joined.")
    max_detections: int = Field(default=100, ge=1, description="Most detections of a prompt in an image.")
    num_samples: int | None = Field(default=None, ge=1, description="Measure on so many images only; None = all.")
