"""LoRA on the click head: its layers, its folder, and the head that a folder makes of a base.

The mask decoder learns; the neck, the prompt encoder and the convolutions that make features of images stay as they
are. So the features of an image serve the base's head and every adapter of it. Modules have the names that they have in
a `sam3_video` checkpoint (`tracker_model.mask_decoder...`): the detector's mask decoder is another one.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn

from sam3lora.config._section import Settings
from sam3lora.config.lora import LoraSettings
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import adapter_folder, add_saved_adapter, refuse_other_base, write_adapter
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.adapter.metadata import CLICKS, AdapterMetadata, read_metadata, write_metadata
from sam3lora.model.adapter.weights import AdapterWeights, read_adapter_weights
from sam3lora.model.clicks.head import ClickHead
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.components import adapted_modules
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import LoadedBase
from sam3lora.model.publish.click_card import render_click_card
from sam3lora.model.publish.model_card import CARD_FILE
from sam3lora.model.staged.trunk import TRUNK

_OF_IMAGES = ("conv_s0", "conv_s1")  # convolutions of the mask decoder that make features of images
_ADAPTABLE = ("transformer", "output_hypernetworks_mlps", "iou_prediction_head", "pred_obj_score_head")


class ClickOrigin(Settings):
    """What a click adapter was trained on, as its folder records it.

    `vision_adapter` is the `trunk_digest` of the adapter whose vision trunk was under the click head; None is the base.
    """

    tracker_fingerprint: str = Field(min_length=1, max_length=64)
    vision_adapter: str | None = Field(default=None, min_length=1, max_length=64)


def add_click_lora(head: ClickHead, settings: LoraSettings) -> PeftModel:
    """Add LoRA to the mask decoder of a head, in place; what is returned holds the decoder, and only LoRA learns.

    Args:
        settings: `components` are not looked at.

    Raises:
        UserError: A target module is none of the decoder, or makes features of images.
    """
    model = apply_lora(_NamedAsInVideo(head.mask_decoder), settings.model_copy(update={"components": None}))
    for name in adapted_modules(model):
        if name.endswith(_OF_IMAGES):
            raise UserError(
                f"lora.target_modules names {name.rpartition('.')[2]}, which makes features of images and stays as it "
                f"is: name layers inside {', '.join(_ADAPTABLE)}"
            )
    return model


def save_click_adapter(model: PeftModel, folder: str | Path, metadata: AdapterMetadata) -> Path:
    """Write what `add_click_lora` returned, in place of an adapter that is there already.

    Raises:
        UserError: ``folder`` exists and is no adapter folder.
        ValueError: A weight is not finite.
    """
    with adapter_folder(folder) as scratch:
        # PEFT shortens names to ends that are unique here, and elsewhere in a whole video model are not.
        write_adapter(model, scratch, metadata, target_modules=list(adapted_modules(model)))
        write_metadata(scratch, metadata.to_dict())
        (scratch / CARD_FILE).write_text(render_click_card(metadata), encoding="utf-8")
    return Path(folder)


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


def load_click_adapter(
    folder: str | Path,
    base: LoadedBase,
    *,
    head: ClickHead | None = None,
    vision_adapter: str | None = None,
    check_base: bool = True,
) -> ClickHead:
    """The click head of a base with an adapter merged into its mask decoder, in evaluation mode.

    The decoder is a copy (17 MB of SAM 3 in float32); all else is shared with ``head``, and features of images too.
    Merging rounds to the type of the head.

    Args:
        head: The base's own, if it is loaded already.
        vision_adapter: `trunk_digest` of the adapter whose vision trunk makes the features; None for the base's.

    Raises:
        UserError: The folder is no click adapter or is damaged, was trained on another base, tracker or vision trunk or
            at another resolution, or the base has no tracker.
    """
    folder = Path(folder)
    metadata, origin = read_click_metadata(folder)
    if metadata.resolution not in (None, base.resolution):
        raise UserError(
            f"{folder} was trained at {metadata.resolution} pixels, the model is loaded at {base.resolution}: load it "
            f"with resolution {metadata.resolution}"
        )
    head = head or load_click_head(base)
    if check_base:
        refuse_other_base(base.model, metadata, folder, fingerprint_of=lambda _: base.fingerprint)
        _refuse_other_tracker(head, origin, folder)
    _refuse_other_trunk(origin, vision_adapter, folder)
    shared = (head.neck, head.prompt_encoder, head.shared_image_embedding, head.no_memory_embedding)
    adapted = copy.deepcopy(head, {id(part): part for part in shared})
    add_saved_adapter(_NamedAsInVideo(adapted.mask_decoder), folder).merge_and_unload(safe_merge=True)
    return adapted.requires_grad_(False).eval()


def trunk_digest(weights: AdapterWeights) -> str | None:
    """SHA-256 of what an adapter changes in the vision trunk; None if that is nothing."""
    changed = {name: one for name, one in weights.modules.items() if name.startswith(TRUNK)}
    if not changed:
        return None
    found = hashlib.sha256()
    for name, one in sorted(changed.items()):
        for tensor in (one.down, one.up, one.gain):
            if tensor is not None:
                found.update(f"{name} {tuple(tensor.shape)};".encode())
                found.update(tensor.to(torch.float32).contiguous().numpy().astype("<f4").tobytes())
    return found.hexdigest()


def add_vision_adapter(base: LoadedBase, folder: str | Path) -> str:
    """Put a prompted adapter on a base, in place and frozen, for its vision trunk; returns its `trunk_digest`.

    Raises:
        UserError: The folder is no such adapter or is damaged, belongs to another base, or leaves the trunk as it is.
    """
    digest = trunk_digest(read_adapter_weights(folder, base.model))
    if digest is None:
        raise UserError(f"clicks.vision_adapter {folder} leaves the vision trunk as it is: remove the key")
    add_saved_adapter(base.model, Path(folder))
    return digest


class _NamedAsInVideo(nn.Module):
    """A mask decoder under the name that it has in a video model."""

    def __init__(self, mask_decoder: nn.Module) -> None:
        super().__init__()
        self.tracker_model = nn.Module()
        self.tracker_model.mask_decoder = mask_decoder


def _refuse_other_tracker(head: ClickHead, origin: ClickOrigin, folder: Path) -> None:
    if (found := fingerprint(head)) != origin.tracker_fingerprint:
        raise UserError(
            f"{folder} was trained on another click head (fingerprint {origin.tracker_fingerprint[:12]}), this base "
            f"has {found[:12]}: use it with the checkpoint that it was trained on"
        )


def _refuse_other_trunk(origin: ClickOrigin, vision_adapter: str | None, folder: Path) -> None:
    def shown(digest: str | None) -> str:
        return "the base" if digest is None else f"an adapter (digest {digest[:12]})"

    if origin.vision_adapter != vision_adapter:
        raise UserError(
            f"{folder} was trained on the vision trunk of {shown(origin.vision_adapter)}, here clicks see that of "
            f"{shown(vision_adapter)}: use it with the trunk that it was trained on, or train one for this trunk by "
            "clicks.vision_adapter"
        )
