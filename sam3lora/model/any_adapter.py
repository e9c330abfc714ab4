"""Adapter folders of every task as plain tensors, for an engine that holds several of them over one base.

The model is only looked at: any thread may read a folder while the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sam3lora.model.adapter.folder import FolderSignature, read_unchanged
from sam3lora.model.adapter.metadata import DETECTION, AdapterMetadata, read_metadata
from sam3lora.model.adapter.weights import AdapterSummary, AdapterWeights, read_lora, read_summary
from sam3lora.model.clicks.weights import read_clicks, summarise_clicks
from sam3lora.model.dense.weights import read_dense, summarise_dense
from sam3lora.model.loading import LoadedBase

if TYPE_CHECKING:
    from sam3lora.model.clicks.head import ClickHead


class AdapterReader:
    """Reads folders for one base.

    Args:
        click_head: Gives the base's click head, which is asked for when a folder is one of task clicks; it raises a
            UserError if there is none.
        max_rank: Larger ranks are refused; None refuses none.
    """

    def __init__(self, base: LoadedBase, click_head: Callable[[], ClickHead], max_rank: int | None = None) -> None:
        self._base = base
        self._click_head = click_head
        self._max_rank = max_rank

    def read(self, folder: str | Path) -> AdapterWeights:
        """The weights of a folder: `DenseWeights` of one that labels pixels, `ClickWeights` of one for the click head.

        Raises:
            NotLowRankError: The adapter does more than LoRA or DoRA on Linear and Conv2d modules.
            UserError: The folder is incomplete or damaged, or for another base, click head or resolution.
        """
        folder = Path(folder)

        def read(signature: FolderSignature) -> AdapterWeights:
            known = self.summarise(folder)
            match _task(known.metadata):
                case "dense":
                    return read_dense(folder, signature, self._base, known)
                case "clicks":
                    return read_clicks(folder, signature, self._click_head(), known)
            return read_lora(folder, signature, self._base.model, known)

        return read_unchanged(folder, read)

    def summarise(self, folder: str | Path) -> AdapterSummary:
        """What is known of a folder without its weights.

        Raises:
            NotLowRankError: The configuration asks for more than LoRA or DoRA.
            UserError: That shows already that `read` would refuse it.
            OSError: A file cannot be read.
        """
        folder = Path(folder)
        match _task(read_metadata(folder)):
            case "dense":
                return summarise_dense(folder, self._base, max_rank=self._max_rank)
            case "clicks":
                return summarise_clicks(folder, self._base, self._click_head(), max_rank=self._max_rank)
        return read_summary(folder, self._base.model, max_rank=self._max_rank)


def _task(metadata: AdapterMetadata | None) -> str:
    return DETECTION if metadata is None else metadata.task
