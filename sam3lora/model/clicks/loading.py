"""Loading the click head of a base model: the tracker's weights of a `sam3_video` checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Sam3VisionConfig
from transformers.models.sam3_tracker.configuration_sam3_tracker import (
    Sam3TrackerMaskDecoderConfig,
    Sam3TrackerPromptEncoderConfig,
)

from sam3lora.errors import UserError
from sam3lora.model.base_folder import BaseFolder, read_tensors
from sam3lora.model.clicks.head import ClickHead
from sam3lora.model.loading import LoadedBase

NECK, TRACKER = "tracker_neck.", "tracker_model."
_POSITIONS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")


def has_click_head(folder: BaseFolder) -> bool:
    """Whether a checkpoint says that it has a tracker."""
    return folder.tracker_config is not None


def load_click_head(base: LoadedBase) -> ClickHead:
    """The frozen click head of a base, in evaluation mode, on its device, in its type and for its resolution.

    Raises:
        UserError: The checkpoint has no tracker, or one that is incomplete or does not fit.
    """
    if base.folder is None:
        raise UserError(f"{base.name} was not loaded from files, which a click head is read from")
    folder = base.folder
    with torch.device("meta"):
        head = build_click_head(folder, base.model.config.vision_config, base.resolution)
    tensors = _tensors(folder)
    expected = head.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(
            f"{folder.path} holds no weights for {len(missing)} tensors of the tracker, "
            f"first {', '.join(missing[:3])}: the checkpoint is incomplete, or was saved without its tracker"
        )
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise UserError(
                f"{folder.path}: {name} of the tracker has shape {tuple(tensors[name].shape)}, "
                f"expected {tuple(tensor.shape)}: its config.json is of another model"
            )
    weight: Tensor = base.model.vision_encoder.backbone.layer_norm.weight  # matrices may be stored in another type
    head.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    matrices = [tensors[name].float() for name in _POSITIONS]
    head.to(device=weight.device, dtype=weight.dtype)
    for module, matrix in zip(
        (head.shared_image_embedding, head.prompt_encoder.shared_embedding), matrices, strict=True
    ):
        module.positional_embedding.data = matrix.to(weight.device)  # places need the precision
    return head.requires_grad_(False).eval()


def build_click_head(folder: BaseFolder, detector_vision: Any, resolution: int) -> ClickHead:
    """A click head of the sizes of a checkpoint's configuration, with random weights.

    Args:
        detector_vision: Configuration of the detector's trunk and neck; the trunk is the tracker's too.
        resolution: Side of the model input in pixels.

    Raises:
        UserError: The checkpoint has no tracker, or its configuration is not valid.
    """
    if folder.tracker_config is None:
        raise UserError(
            f"{folder.name} has no tracker: clicks need a sam3_video checkpoint, such as facebook/sam3, or tiny"
        )
    parts = {name: _plain(folder.tracker_config.get(f"{name}_config")) for name in ("prompt_encoder", "mask_decoder")}
    neck = _plain(folder.tracker_config.get("vision_config"))
    own = {name: neck[name] for name in ("fpn_hidden_size", "scale_factors") if name in neck}
    try:
        vision = Sam3VisionConfig(**(detector_vision.to_dict() | own))
        prompts = Sam3TrackerPromptEncoderConfig(**(parts["prompt_encoder"] | {"image_size": resolution}))
        return ClickHead(vision, prompts, Sam3TrackerMaskDecoderConfig(**parts["mask_decoder"]))
    except Exception as error:  # transformers and torch raise several kinds for values they do not accept
        raise UserError(f"{folder.path / 'config.json'} has no valid configuration of a tracker: {error}") from error


def _plain(config: Any) -> dict[str, Any]:
    """A configuration's own values; `model_type` differs between the tracker's classes, and no part reads it."""
    return {name: value for name, value in (config or {}).items() if name != "model_type"}


def _tensors(folder: BaseFolder) -> dict[str, Tensor]:
    """The tracker's tensors, named as in a `ClickHead`; its memory is left out."""
    found = {}
    for key, tensor in read_tensors(folder.path, (NECK, TRACKER)).items():
        if key.startswith(NECK):
            found["neck." + key.removeprefix(NECK)] = tensor
        else:  # transformers' own save_pretrained writes the prefix twice
            found[key.removeprefix(TRACKER).removeprefix(TRACKER)] = tensor
    return found
