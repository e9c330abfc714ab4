"""Post-processing and metrics of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .metrics import METRICS, BestMetric, Task
from .post_processing import PostProcessing, PostProcessingFields

LOWEST_THRESHOLD = 0.05  # no useful threshold is lower
EXACT_UP_TO_PAIRS = 4_000  # of image and prompt, on which detections of any score are measured
LOW_SCORE = 0.001  # of the lowest detections that are measured on more


class EvaluationSection(PostProcessingFields):
    """Post-processing, which is recorded with the adapter, and when the adapter is measured."""

    every_epochs: int = Field(
        default=0,
        ge=0,
        description="Epochs between measurements of mAP and cgF1, also at the end; 0 = only the validation loss.",
    )
    best_metric: Literal["auto"] | BestMetric = Field(
        default="auto",
        description="Metric that decides best/ and early stopping; auto = map (of task dense mean_iou; of task clicks "
        "mean_iou_3, after three clicks) where it is measured, else valid_loss. Task clicks also has mean IoU after 1, "
        "2, 5, 8 and 20 clicks, and noc_80, noc_85, noc_90: clicks up to an IoU of 0.80 and so on, of at most 20. A "
        "metric of detections without a value on the validation images is replaced by bbox_map, then by the loss.",
    )
    base_loss: bool = Field(default=True, description="Measure the validation loss of the base before the first step.")
    num_samples: int | None = Field(
        default=None, ge=1, description="Measure metrics and loss on the first so many validation images; None = all."
    )

    lowest_score: Annotated[float, Field(ge=0, le=LOWEST_THRESHOLD)] | Literal["auto"] = Field(
        default="auto",
        description="Lowest score of a detection that is measured; auto = 0 for up to "
        f"{EXACT_UP_TO_PAIRS:,} pairs of image and prompt, {LOW_SCORE:g} for more.",
    )

    @property
    def post_processing(self) -> PostProcessing:
        return PostProcessing(**{name: getattr(self, name) for name in PostProcessing.model_fields})

    def chosen_best_metric(self, task: Task) -> BestMetric:
        """`best_metric`, where auto is replaced by the first metric of the task, or the loss."""
        if self.best_metric == "auto":
            return METRICS[task][0] if self.every_epochs else "valid_loss"
        return self.best_metric

    @model_validator(mode="after")
    def _check_best_metric(self) -> EvaluationSection:
        if self.best_metric not in ("auto", "valid_loss") and not self.every_epochs:
            raise ValueError(
                f"best_metric {self.best_metric} is never measured while every_epochs is 0: set every_epochs to 1"
            )
        return self
