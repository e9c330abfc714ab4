"""The adapters whose vision trunk a click adapter was trained on, among those that are served."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sam3lora.model.adapter.folder import FolderSignature
from sam3lora.model.adapter.metadata import DETECTION
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
        self._known = {one.info.id: (one.signature, self._digest(one)) for one in changing}
        return [
            one
            if one.vision_adapter is None
            else one.changed(
                vision_adapters=[id_ for id_, (_, found) in self._known.items() if found == one.vision_adapter]
            )
            for one in listed
        ]

    def _digest(self, one: Described) -> str | None:
        signature, digest = self._known.get(one.info.id, ((), None))
        if signature == one.signature:
            return digest
        try:
            return self._read_digest(one.info.id)
        except Exception as error:  # a damaged file may raise anything; a request for the adapter says what
            logger.debug("adapter %s has no vision trunk to compare: %s", one.info.id, error)
            return None
