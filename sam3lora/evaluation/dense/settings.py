"""The settings of an evaluation of dense models, beside the model and the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sam3lora.config.training import OnBadImage, TrainingSection
from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.errors import UserError
from sam3lora.evaluation.settings import check_on_bad_image, without_stop
from sam3lora.model.dense.settings import DenseSettings


@dataclass(frozen=True)
class DenseEvaluation:
    """How dense models are measured.

    Args:
        threshold: Probability from which a pixel has a class, in modes binary and multilabel; None takes the model's.
        paper_normalisation: Stretch the probabilities of each image to [0, 1] first, as many papers do; mode binary.
        num_samples: Measure the first so many images; None takes all.
        batch_size: Images that pass the model together.
        on_bad_image: "skip" leaves out images that are missing or cannot be read, and the results name them; "stop"
            refuses the split.

    Raises:
        UserError: A value is out of range.
    """

    threshold: float | None = None
    paper_normalisation: bool = False
    num_samples: int | None = None
    batch_size: int = 4
    annotation_file: str = ANNOTATION_FILE
    on_bad_image: OnBadImage = TrainingSection.model_fields["on_bad_image"].default

    def __post_init__(self) -> None:
        check_on_bad_image(self.on_bad_image)
        for name in ("num_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be positive, got {value}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UserError(f"threshold must be above 0 and below 1 for a dense model, got {self.threshold}")

    def of_model(self, model: DenseSettings) -> DenseSettings:
        """The settings of a model with the threshold to use.

        Raises:
            UserError: A setting has no effect on a model of this mode.
        """
        if self.paper_normalisation and model.mode != "binary":
            raise UserError(f"paper normalisation is of mode binary, this model's is {model.mode}: leave it out")
        if self.threshold is None:
            return model
        if model.mode == "multiclass":
            raise UserError("a threshold has no effect in mode multiclass, where the best class wins: leave it out")
        return model.model_copy(update={"threshold": self.threshold})

    def to_dict(self) -> dict[str, Any]:
        """For reports, without what is at its default and says nothing, and without the threshold."""
        quiet = ("num_samples", "threshold")
        shown = without_stop(asdict(self))
        return {name: value for name, value in shown.items() if name != "threshold" and (value or name not in quiet)}
