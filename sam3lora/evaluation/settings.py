"""The settings of an evaluation, beside the models and the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from sam3lora.config.evaluation import EXACT_UP_TO_PAIRS, LOW_SCORE, LOWEST_THRESHOLD, EvaluationSection
from sam3lora.config.post_processing import PostProcessing
from sam3lora.config.training import OnBadImage, TrainingSection
from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.errors import UserError
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory, incomplete_categories


@dataclass(frozen=True)
class EvaluationSettings:
    """The same for all models that are compared.

    Args:
        post: Fields of `PostProcessing` that hold for all models. The others are as each adapter records them, so that
            it is measured as it is served.
        num_samples: Measure the first so many images; None takes all.
        categories: Names to ask for; None takes those of the split.
        prompts: Category name -> prompt, where it is not the name.
        negative_prompts: Further prompts, which no image shows.
        exhaustive: Whether a missing annotation means absence, or the names of the categories of which it does.
        lowest_score: Detections below it are not measured. "auto" is 0, which is exact, up to `EXACT_UP_TO_PAIRS` pairs
            of image and prompt, and `LOW_SCORE` above: every pair has as many detections as the model has object
            queries, nearly all with a score of about 0, and each takes the work of a mask.
        batch_size: Images at a time.
        max_prompts_per_forward: (image, prompt) pairs in one forward pass.
        on_bad_image: "skip" leaves out images that are missing or cannot be read, and the results name them; "stop"
            refuses the split.
        semantic: Measure SAM 3's semantic output too, which takes a second pass.

    Raises:
        UserError: A value is out of range.
    """

    post: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int | None = None
    annotation_file: str = ANNOTATION_FILE
    categories: tuple[str, ...] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    negative_prompts: tuple[str, ...] = ()
    exhaustive: bool | tuple[str, ...] = True
    lowest_score: float | Literal["auto"] = EvaluationSection.model_fields["lowest_score"].default
    batch_size: int = 4
    max_prompts_per_forward: int = 8
    on_bad_image: OnBadImage = TrainingSection.model_fields["on_bad_image"].default
    semantic: bool = False

    def __post_init__(self) -> None:
        self.post_processing(PostProcessing())
        check_on_bad_image(self.on_bad_image)
        for name in ("num_samples", "batch_size", "max_prompts_per_forward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be positive, got {value}")
        if self.lowest_score != "auto" and not 0 <= self.lowest_score <= LOWEST_THRESHOLD:
            raise UserError(
                f"lowest_score must be auto or between 0 and {LOWEST_THRESHOLD}, got {self.lowest_score}: mAP counts "
                "low scores too; for counts and pictures use threshold"
            )

    def changed(self, **changes: Any) -> EvaluationSettings:
        """A copy with other values; fields of `PostProcessing` may be among them."""
        given = {name: value for name, value in changes.items() if name in PostProcessing.model_fields}
        others = {name: value for name, value in changes.items() if name not in given}
        return replace(self, **others, post={**self.post, **given})

    def replaced_post(self, post: Mapping[str, Any]) -> EvaluationSettings:
        """A copy with these fields of `PostProcessing` and no others."""
        return replace(self, post=post)

    def post_processing(self, recorded: PostProcessing) -> PostProcessing:
        """The post-processing of a model that records its own."""
        return recorded.changed(**self.post)

    def score_floor(self, num_pairs: int) -> float:
        """Lowest score of the detections that are measured on so many pairs of image and prompt."""
        if self.lowest_score != "auto":
            return self.lowest_score
        return 0.0 if num_pairs <= EXACT_UP_TO_PAIRS else LOW_SCORE

    def incomplete(self, categories: Sequence[PromptedCategory]) -> frozenset[int]:
        """Ids of the categories whose objects are not all annotated."""
        return incomplete_categories(categories, self.exhaustive, self.negative_prompts)

    def to_dict(self) -> dict[str, Any]:
        """For reports, without what is at its default and says nothing, and without post-processing."""
        shown = asdict(self) | {"prompts": dict(self.prompts)}
        quiet = ("prompts", "negative_prompts", "categories", "num_samples", "semantic")
        shown = {name: value for name, value in shown.items() if name != "post" and (value or name not in quiet)}
        return without_stop(shown)


def check_on_bad_image(value: str) -> None:
    """Raise UserError for what is none of the choices."""
    if value not in get_args(OnBadImage):
        raise UserError(f"on_bad_image must be {' or '.join(get_args(OnBadImage))}, got {value!r}")


def without_stop(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for a report, with `on_bad_image` only where images may be left out."""
    return {name: value for name, value in settings.items() if (name, value) != ("on_bad_image", "stop")}
