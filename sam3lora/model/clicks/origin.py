"""`ClickOrigin`: what a click adapter was trained on. No torch here."""

from __future__ import annotations

from pydantic import Field

from sam3lora.config._section import Settings


class ClickOrigin(Settings):
    """What a click adapter was trained on, as its folder records it.

    `vision_adapter` is the `trunk_digest` of the adapter whose vision trunk was under the click head; None is the base.
    """

    tracker_fingerprint: str = Field(min_length=1, max_length=64)
    vision_adapter: str | None = Field(default=None, min_length=1, max_length=64)

    def trunk_fault(self, vision_adapter: str | None) -> str | None:
        """Why an adapter of this origin does not go with a vision trunk, that of the digest; None if it does."""
        if self.vision_adapter == vision_adapter:
            return None
        use = "clicks_vision base" if self.vision_adapter is None else "that adapter"
        return (
            f"was trained on the vision trunk of {_shown(self.vision_adapter)}, here clicks see that of "
            f"{_shown(vision_adapter)}: use it with {use}, or train one for this trunk by clicks.vision_adapter"
        )


def _shown(digest: str | None) -> str:
    return "the base" if digest is None else f"an adapter (digest {digest[:12]})"
