"""LoRA on the click head: its layers, its folder, and the head that a folder makes of a base.

The mask decoder learns; the neck, the prompt encoder and the convolutions that make features of images stay as they
are. So the features of an image serve the base's head and every adapter of it. Modules have the names that they have in
a `sam3_video` checkpoint (`tracker_model.mask_decoder...`): the detector's mask decoder is another one.
"""

from __future__ import annotations

import copy
from pathlib import Path

from peft import PeftModel

from sam3lora.config.lora import LoraSettings
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import adapter_folder, add_saved_adapter, read_unchanged, write_adapter
from sam3lora.model.adapter.lora_layers import apply_lora
from sam3lora.model.adapter.metadata import AdapterMetadata, write_metadata
from sam3lora.model.adapter.weights import read_adapter_weights
from sam3lora.model.clicks.head import ClickHead
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.clicks.origin import ClickOrigin
from sam3lora.model.clicks.weights import (
    OF_IMAGES,
    NamedAsInVideo,
    read_click_metadata,
    read_clicks,
    summarise_clicks,
)
from sam3lora.model.components import adapted_modules
from sam3lora.model.loading import LoadedBase
from sam3lora.model.publish.click_card import render_click_card
from sam3lora.model.publish.model_card import CARD_FILE

__all__ = [
    "ClickOrigin",
    "add_click_lora",
    "add_vision_adapter",
    "load_click_adapter",
    "read_click_metadata",
    "save_click_adapter",
]

_ADAPTABLE = ("transformer", "output_hypernetworks_mlps", "iou_prediction_head", "pred_obj_score_head")


def add_click_lora(head: ClickHead, settings: LoraSettings) -> PeftModel:
    """Add LoRA to the mask decoder of a head, in place; what is returned holds the decoder, and only LoRA learns.

    Args:
        settings: `components` are not looked at.

    Raises:
        UserError: A target module is none of the decoder, or makes features of images.
    """
    model = apply_lora(NamedAsInVideo(head.mask_decoder), settings.model_copy(update={"components": None}))
    for name in adapted_modules(model):
        if name.endswith(OF_IMAGES):
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
    plain = head or load_click_head(base)
    weights = read_unchanged(
        folder,
        lambda signature: read_clicks(
            folder, signature, plain, summarise_clicks(folder, base, plain, check_base=check_base)
        ),
    )
    if fault := weights.origin.trunk_fault(vision_adapter):
        raise UserError(f"{folder} {fault}")
    shared = (plain.neck, plain.prompt_encoder, plain.shared_image_embedding, plain.no_memory_embedding)
    adapted = copy.deepcopy(plain, {id(part): part for part in shared})
    modules = dict(NamedAsInVideo(adapted.mask_decoder).named_modules())
    for name, update in weights.updates.items():
        weight = modules[name].weight
        own = weight.float() if update.gain is None else update.gain.to(weight.device)[:, None] * weight.float()
        weight.data = (own + (update.up @ update.down).to(weight.device)).to(weight.dtype)
    return adapted.requires_grad_(False).eval()


def add_vision_adapter(base: LoadedBase, folder: str | Path) -> str:
    """Put a prompted adapter on a base, in place and frozen, for its vision trunk; returns its `trunk_digest`.

    Raises:
        UserError: The folder is no such adapter or is damaged, belongs to another base, or leaves the trunk as it is.
    """
    digest = read_adapter_weights(folder, base.model).trunk_digest
    if digest is None:
        raise UserError(f"clicks.vision_adapter {folder} leaves the vision trunk as it is: remove the key")
    add_saved_adapter(base.model, Path(folder))
    return digest
