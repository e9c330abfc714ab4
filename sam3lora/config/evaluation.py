"""Post-processing and metrics of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .post_processing import PostProcessing, PostProcessingFields


class EvaluationSection(PostProcessingFields):
    """Post-processing, which is recorded with the adapter, and when the adapter is measured."""

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
    num_samples: int | None = Field(default=None, ge=1, description="Measure on so many images only; None = all.")

    @property
    def post_processing(self) -> PostProcessing:
        """The post-processing settings alone."""
        return PostProcessing(**{name: getattr(self, name) for name in PostProcessing.model_fields})

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
