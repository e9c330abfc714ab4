"""The adapters whose vision trunk a click adapter was trained on, among those that are served."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sam3lora.model.adapter.folder import FolderSignature
from sam3lora.model.adapter.metadata import DETECTION
from serve_app.http.errors import ServeError
from serve_app.replica.adapter_folders import Described

logger = logging.getLogger(__name__)


class VisionTrunks:
    """Names the adapters with a trunk. Belongs to one thread, as it reads weights.

    Weights are read when a click adapter was trained on the trunk of some adapter, of each folder once.

    Args:
        read_digest: The `trunk_digest` of the adapter of an id.
    """

    def __init__(self, read_digest: Callable[[str], str | None]) -> None:
        self._read_digest = read_digest
        self._known: dict[str, tuple[FolderSignature, str | None]] = {}

    def named(self, listed: list[Described]) -> list[Described]:
        """The same adapters, where `vision_adapters` of click adapters has those of the list that go with them."""
        if all(one.vision_adapter is None for one in listed):
            return listed
        changing = [one for one in listed if one.info.task == DETECTION and "vision_encoder" in one.info.adapts]
        looked_at = {one.info.id: self._look(one) for one in changing}
        self._known = {id_: found for id_, found in looked_at.items() if found is not None}
        return [
            one
            if one.vision_adapter is None
            else one.changed(
                vision_adapters=[id_ for id_, (_, found) in self._known.items() if found == one.vision_adapter]
            )
            for one in listed
        ]

    def _look(self, one: Described) -> tuple[FolderSignature, str | None] | None:
        """The folder's signature and digest; None if it could not be read now, but may be at the next listing."""
        known = self._known.get(one.info.id)
        if known is not None and known[0] == one.signature:
            return known
        try:
            return one.signature, self._read_digest(one.info.id)
        except Exception as error:  # a damaged file may raise anything; a request for the adapter says what
            logger.debug("adapter %s has no vision trunk to compare: %s", one.info.id, error)
            passes = isinstance(error, MemoryError) or (isinstance(error, ServeError) and error.retry_after_s)
            return None if passes else (one.signature, None)
