"""Post-processing settings: the one declaration that YAML, adapters, commands, HTTP and Python share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from pydantic import Field, field_validator

from sam3lora.errors import UserError

from ._section import Section, Settings

EARLIER_NAMES = {"detection_threshold": "threshold", "prob_threshold": "threshold"}
"""Names of settings in files, adapters and code of earlier versions."""


class PostProcessingFields(Section):
    """The fields of `PostProcessing`, shared with the `evaluation` section of a configuration."""

    threshold: float = Field(
        default=0.5, ge=0, le=1, description="Lowest score kept; score = sigmoid(logit) x sigmoid(presence)."
    )
    prompt_thresholds: Mapping[str, float] = Field(
        default_factory=dict, description="Prompt -> lowest score kept, where it differs from `threshold`."
    )
    nms: Literal["mask", "box", "none"] = Field(
        default="mask",
        description='Overlap that makes two detections one object: of their "mask" (always after merging) or "box"; '
        '"none" keeps both.',
    )
    nms_iou: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="Of two detections of a prompt with a larger IoU only the better one stays.",
    )
    merge: bool = Field(
        default=False,
        description="Join overlapping detections instead: for cracks and other things without countable parts.",
    )
    merge_iou: float = Field(
        default=0.15, ge=0, le=1, description="Mask IoU from which detections are joined, transitively."
    )
    max_detections: int = Field(
        default=100, ge=1, le=1_000_000, description="Most detections of a prompt in an image; the best stay."
    )

    @field_validator("prompt_thresholds")
    @classmethod
    def _check_prompt_thresholds(cls, thresholds: Mapping[str, float]) -> Mapping[str, float]:
        for prompt, threshold in thresholds.items():
            if not 0 <= threshold <= 1:
                raise ValueError(f"should be between 0 and 1, got {threshold} for {prompt!r}")
        return thresholds


class PostProcessing(PostProcessingFields, Settings):
    """Post-processing settings: immutable, checked, the same defaults everywhere.

    An adapter records its own; they are the defaults wherever that adapter is used. `changed` applies what a user
    gave explicitly.
    """

    def changed(self, **values: Any) -> PostProcessing:
        """A copy with other values; a value of None leaves the field as it is.

        A new `threshold` is for all prompts: it drops the recorded `prompt_thresholds`, unless they are given too.

        Raises:
            UserError: A value is out of range, or a setting is given under its earlier name as well.
        """
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = EARLIER_NAMES.get(key, key)
            if value is not None and name in given:
                raise UserError(f"{key} is another name of {name}: give one of them")
            if value is not None:
                given[name] = value
        if "threshold" in given:
            given.setdefault("prompt_thresholds", {})
        return PostProcessing(**{**dict(self), **given}) if given else self

    def threshold_of(self, prompt: str) -> float:
        """The lowest score that is kept for a prompt; case and outer space do not count, as for the model."""
        own = {name.strip().lower(): value for name, value in self.prompt_thresholds.items()}
        return own.get(prompt.strip().lower(), self.threshold)

    @property
    def lowest_threshold(self) -> float:
        return min([self.threshold, *self.prompt_thresholds.values()])

    @property
    def needs_masks(self) -> bool:
        """Whether masks decide, also where nobody asked to see them."""
        return self.merge or self.nms == "mask"


class PostProcessingOptions(TypedDict, total=False):
    """Settings that a caller may give; those left out or None are as the adapter records them."""

    threshold: float | None
    prompt_thresholds: Mapping[str, float] | None
    nms: Literal["mask", "box", "none"] | None
    nms_iou: float | None
    merge: bool | None
    merge_iou: float | None
    max_detections: int | None
    detection_threshold: float | None  # earlier name of threshold
