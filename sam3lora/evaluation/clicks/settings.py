"""The settings of an evaluation by clicks, beside the model and the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from sam3lora.engine.clicks.decoder import ClicksVision
from sam3lora.engine.clicks.interaction import SeedKind
from sam3lora.engine.clicks.mask_cleaning import AS_IT_IS, MaskCleaning
from sam3lora.errors import UserError
from sam3lora.evaluation.clicks.simulated_user import MAX_CLICKS
from sam3lora.evaluation.settings import EvaluationSettings


@dataclass(frozen=True)
class ClickEvaluation:
    """How clicks are measured.

    Args:
        start_from: What of a detection goes with the first click, where the user starts from what the prompt found.
            None measures clicks without a prompt only, in about half the time.
        clicks_vision: Whose vision trunk the click head sees; "base" takes a second vision pass if the adapter changes
            the trunk.
        max_clicks: Of one object; NoC depends on it.
        cleaning: Of the masks that the user sees and that are compared with the objects.
        prompting: Categories, prompts, number of images, and the post-processing of the detections to start from.

    Raises:
        UserError: A value is out of range.
    """

    start_from: SeedKind | None = "both"
    clicks_vision: ClicksVision = "adapter"
    max_clicks: int = MAX_CLICKS
    cleaning: MaskCleaning = AS_IT_IS
    prompting: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("start_from", self.start_from, (*get_args(SeedKind), None)),
            ("clicks_vision", self.clicks_vision, get_args(ClicksVision)),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if self.max_clicks < 1:
            raise UserError(f"max_clicks must be positive, got {self.max_clicks}")

    def to_dict(self) -> dict[str, Any]:
        """For reports, without post-processing."""
        measured_otherwise = ("lowest_score", "exhaustive", "semantic")
        prompting = {n: v for n, v in self.prompting.to_dict().items() if n not in measured_otherwise}
        return {
            "start_from": self.start_from or "none",
            "clicks_vision": self.clicks_vision,
            "max_clicks": self.max_clicks,
            **asdict(self.cleaning),
            **prompting,
        }
