"""`SplitClicks`: what came of the clicks on some images, with and without a prompt before them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sam3lora.evaluation.clicks.meter import ClickMeter

ObjectId = tuple[int, int]
"""(image id, number of the object among the image's annotations)."""


@dataclass(frozen=True)
class ClickedFacts:
    """What else is known of an object that was clicked on.

    Attributes:
        category: Its name.
        is_found: Whether the prompt found it, so that a user may start from there.
        shown: `SHOWN_CLICKS` -> mask without a prompt after so many clicks, as RLE.
    """

    category: str
    is_found: bool
    shown: dict[int, dict[str, Any]] = field(repr=False)


@dataclass
class SplitClicks:
    """The runs of all objects of some images.

    Attributes:
        alone: Clicks from nothing.
        from_text: Clicks from what the prompt found, and from nothing where it did not find an object; empty if no
            prompt was asked.
        facts: Of each object.
        counts: `images`, and `without_mask` objects and `crowds`, which are not clicked on.
    """

    alone: ClickMeter
    from_text: ClickMeter
    facts: dict[ObjectId, ClickedFacts] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def empty(cls, max_clicks: int) -> SplitClicks:
        return cls(ClickMeter(max_clicks), ClickMeter(max_clicks))

    def merge(self, other: SplitClicks) -> None:
        """Add the runs of other images.

        Raises:
            ValueError: An object is in both.
        """
        self.alone.merge(other.alone)
        self.from_text.merge(other.from_text)
        self.facts |= other.facts
        self.counts += other.counts
