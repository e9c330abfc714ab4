"""How detections are made from scores and masks, and when they are measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ._section import Section


class EvaluationSection(Section):
    """Post-processing and metrics."""

    every_epochs: int = Field(
        default=0,
        ge=0,
        description="Measure mAP and cgF1 every so many epochs; 0 = the validation loss only.",
    )
    best_metric: Literal["auto", "valid_loss", "map", "cgf1"] = Field(
        default="auto",
        description="What chooses best/ and early stopping watches; auto = map where it is measured, else valid_loss.",
    )
    base_loss: bool = Field(default=True, description="Validation loss of the base before the first step.")
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

    @property
    def chosen_best_metric(self) -> Literal["valid_loss", "map", "cgf1"]:
        """`best_metric` with auto resolved."""
        if self.best_metric == "auto":
            return "map" if self.every_epochs else "valid_loss"
        return self.best_metric

    @model_validator(mode="after")
    def _check_best_metric(self) -> EvaluationSection:
        if self.best_metric in ("map", "cgf1") and not self.every_epochs:
            raise ValueError(
                f"best_metric {self.best_metric} is never measured while every_epochs is 0: set every_epochs to 1"
            )
        return self
