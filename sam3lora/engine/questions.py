"""What a mixed batch is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from sam3lora.engine.detect import Kept
from sam3lora.engine.detections import BoxPrompt, PostProcessing
from sam3lora.engine.feature_cache import PreparedImage


@dataclass(frozen=True)
class Question:
    """What is asked of one image.

    Attributes:
        image: From `MixedBatchSegmenter.prepare_image`.
        prompts: Non-empty texts of at most 32 tokens; may be empty if there are boxes.
        boxes: Go with every prompt.
        slot: Where the adapter is; None asks the base.
        post: Threshold, suppression or merging, and limit.
        masks: Whether masks are wanted.
    """

    image: PreparedImage
    prompts: tuple[str, ...]
    boxes: tuple[BoxPrompt, ...] = ()
    slot: int | None = None
    post: PostProcessing = field(default_factory=PostProcessing)
    masks: bool = True

    @property
    def num_rows(self) -> int:
        """Find queries that it takes."""
        return max(1, len(self.prompts))


@dataclass(frozen=True)
class Answer:
    """What each prompt found, in numpy arrays, with masks at the size the model makes them."""

    prompts: tuple[str, ...]
    size_hw: tuple[int, int]
    kept: list[Kept] = field(repr=False)
