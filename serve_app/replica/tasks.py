"""What an adapter can be asked, and the refusal of what it cannot."""

from __future__ import annotations

from typing import TypeVar

from sam3lora.config.post_processing import PostProcessing
from sam3lora.model.clicks.origin import ClickOrigin
from sam3lora.model.dense.settings import DenseSettings
from serve_app.http.errors import ServeError
from serve_app.replica.adapter_slots import Recorded

R = TypeVar("R", PostProcessing, DenseSettings, ClickOrigin)

_DOES: dict[type, tuple[str, str]] = {
    PostProcessing: ("finds objects of prompts", "ask it with POST /v1/segment"),
    DenseSettings: ("labels each pixel", "ask it with POST /v1/dense"),
    ClickOrigin: ("answers clicks", "give it to POST /v1/refine as click_adapter"),
}


def expect(wanted: type[R], adapter_id: str | None, recorded: Recorded, field: str = "adapter") -> R:
    """What an adapter has recorded, which is of the wanted kind.

    Raises:
        ServeError: It is of another task.
    """
    if isinstance(recorded, wanted):
        return recorded
    does, instead = _DOES[type(recorded)]
    if field != "adapter":
        instead = "expected one of task clicks, which GET /v1/adapters lists"
    raise ServeError("wrong_task", f"{field} {adapter_id!r} {does}: {instead}", field=field)
