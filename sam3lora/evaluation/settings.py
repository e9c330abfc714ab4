"""What an evaluation depends on beside the model and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.engine.detections import PostProcessing
from sam3lora.errors import UserError


@dataclass(frozen=True)
class EvaluationSettings:
    """The same for all models that are to be compared.

    Args:
        threshold: Lowest score of what counts as a detection in counts, false alarms and pictures; mAP has no cut.
        nms_iou: Of two masks of a prompt that overlap more, only the better one stays; 1 keeps all.
        merge: Join overlapping masks instead, among detections at or above the threshold.
        merge_iou: Overlap from which masks are joined.
        max_detections: Most detections of a prompt in an image.
        num_samples: Measure the first so many images; None takes all.
        annotation_file: Name of the annotation file.
        categories: Names to ask for; None takes those of the split.
        prompts: Category name -> prompt, where it is not the name.
        negative_prompts: Further prompts, which no image shows.
        exhaustive: Whether a missing annotation means absence.
        batch_size: Images at a time.
        max_prompts_per_forward: (image, prompt) pairs at a time.

    Raises:
        UserError: A value out of range.
    """

    threshold: float = 0.3
    nms_iou: float = 0.7
    merge: bool = False
    merge_iou: float = 0.15
    max_detections: int = 100
    num_samples: int | None = None
    annotation_file: str = ANNOTATION_FILE
    categories: tuple[str, ...] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    negative_prompts: tuple[str, ...] = ()
    exhaustive: bool = True
    batch_size: int = 4
    max_prompts_per_forward: int = 8

    def __post_init__(self) -> None:
        self.post_processing()
        for name in ("num_samples", "batch_size", "max_prompts_per_forward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be positive, got {value}")

    def post_processing(self, lowest_score: float = 0.0) -> PostProcessing:
        """Without a score cut, which mAP needs: detections below the threshold stay, but are never merged."""
        if not 0 <= self.threshold <= 1:
            raise UserError(f"the threshold must be between 0 and 1, got {self.threshold}")
        return PostProcessing(
            threshold=lowest_score,
            nms="mask",
            nms_iou=self.nms_iou,
            merge=self.merge,
            merge_iou=self.merge_iou,
            merge_threshold=self.threshold,
            max_detections=self.max_detections,
        )

    def to_dict(self) -> dict:
        """For reports; what is at its default and says nothing is left out."""
        shown = asdict(self) | {"prompts": dict(self.prompts)}
        quiet = ("prompts", "negative_prompts", "categories", "num_samples")
        return {name: value for name, value in shown.items() if value or name not in quiet}
