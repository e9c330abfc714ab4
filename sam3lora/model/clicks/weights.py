"""Click adapters as plain tensors, checked against the click head that they were trained on.

Modules have the names that they have in a `sam3_video` checkpoint (`tracker_model.mask_decoder...`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import FolderSignature, refuse_other_base
from sam3lora.model.adapter.metadata import CLICKS, AdapterMetadata, read_metadata
from sam3lora.model.adapter.weights import (
    AdapterSummary,
    AdapterWeights,
    LoraWeights,
    fingerprint_once,
    read_lora,
    summarise_lora,
)
from sam3lora.model.clicks.origin import ClickOrigin
from sam3lora.model.loading import LoadedBase

if TYPE_CHECKING:
    from sam3lora.model.clicks.head import ClickHead  # with parts of transformers that others leave out

OF_IMAGES = ("conv_s0", "conv_s1")
"""Convolutions of the mask decoder that make features of images, which all click adapters share."""


@dataclass(frozen=True)
class ClickWeights(AdapterWeights):
    """The LoRA of a click adapter: `updates` of the click head by module. Of the detector it changes nothing."""

    updates: dict[str, LoraWeights]
    origin: ClickOrigin


class NamedAsInVideo(nn.Module):
    """A mask decoder under the name that it has in a video model."""

    def __init__(self, mask_decoder: nn.Module) -> None:
        super().__init__()
        self.tracker_model = nn.Module()
        self.tracker_model.mask_decoder = mask_decoder


def read_click_metadata(folder: str | Path) -> tuple[AdapterMetadata, ClickOrigin]:
    """The metadata of a click adapter, before its base is loaded.

    Raises:
        UserError: The folder is none of task clicks.
    """
    metadata = read_metadata(folder)
    if metadata is None or metadata.clicks is None:
        found = "no sam3lora.json" if metadata is None else f"task {metadata.task}"
        raise UserError(f"{folder} is no click adapter: expected one of task {CLICKS}, got {found}")
    return metadata, ClickOrigin(**metadata.clicks)


def summarise_clicks(
    folder: Path, base: LoadedBase, head: ClickHead, *, max_rank: int | None = None, check_base: bool = True
) -> AdapterSummary:
    """What is known of a click adapter without its weights.

    Args:
        head: The base's own.

    Raises:
        NotLowRankError: The configuration asks for more than LoRA or DoRA.
        UserError: That shows already that it was trained on another base or tracker, or at another resolution.
        OSError: A file cannot be read.
    """
    metadata, origin = read_click_metadata(folder)
    if metadata.resolution not in (None, base.resolution):
        raise UserError(
            f"{folder} was trained at {metadata.resolution} pixels, the model is loaded at {base.resolution}: load it "
            f"with resolution {metadata.resolution}"
        )
    if check_base:
        refuse_other_base(base.model, metadata, folder, fingerprint_of=lambda _: base.fingerprint)
        if (found := fingerprint_once(head)) != origin.tracker_fingerprint:
            raise UserError(
                f"{folder} was trained on another click head (fingerprint {origin.tracker_fingerprint[:12]}), this "
                f"base has {found[:12]}: use it with the checkpoint that it was trained on"
            )
    return summarise_lora(folder, metadata, max_rank=max_rank)


def read_clicks(folder: Path, signature: FolderSignature, head: ClickHead, known: AdapterSummary) -> ClickWeights:
    """Read the weights of a click adapter, in the version of this signature, whose summary is known.

    Raises:
        NotLowRankError: It does more than LoRA or DoRA on Linear modules.
        UserError: Its files are damaged, do not fit the head, or change what makes features of images.
    """
    assert known.metadata is not None
    assert known.metadata.clicks is not None
    lora = read_lora(folder, signature, NamedAsInVideo(head.mask_decoder), known)
    if shared := [name for name in lora.modules if name.endswith(OF_IMAGES)]:
        raise UserError(f"{folder} changes {shared[0]}, which makes features of images that all adapters share")
    values = {field.name: getattr(lora, field.name) for field in fields(lora)}
    values |= {"modules": {}, "components": frozenset()}
    return ClickWeights(**values, updates=lora.modules, origin=ClickOrigin(**known.metadata.clicks))
