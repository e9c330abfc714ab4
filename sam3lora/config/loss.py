"""Weights and options of SAM 3's training loss: the one declaration, which the criterion reads too."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ._section import Section


class LossSection(Section):
    """Term weights and options; a weight of 0 switches its term off. The defaults are those SAM 3 was trained with."""

    bbox: float = Field(default=5.0, ge=0, description="L1 distance of the boxes.")
    giou: float = Field(default=2.0, ge=0, description="1 - generalised IoU of the boxes.")
    ce: float = Field(default=20.0, ge=0, description="IoU-aware classification of the object queries.")
    presence: float = Field(default=20.0, ge=0, description="Whether the prompt is in the image at all.")
    mask: float = Field(default=200.0, ge=0, description="Focal loss of the masks.")
    dice: float = Field(default=10.0, ge=0, description="Dice loss of the masks.")
    semantic: float = Field(default=20.0, ge=0, description="Focal loss of the semantic mask (union of the objects).")
    semantic_dice: float = Field(default=30.0, ge=0, description="Dice loss of the semantic mask.")
    o2m: float = Field(default=2.0, ge=0, description="Factor on all terms of the one-to-many branch.")
    pos_weight: float = Field(default=10.0, gt=0, description="Factor on matched queries in the classification term.")
    mask_resolution: Literal["full", "low", "points"] = Field(
        default="full",
        description='Where masks are compared: "full" = at the model input size as SAM 3 does, "low" = at the size of '
        'the predicted masks (less memory), "points" = at sampled points (least memory).',
    )
    num_points: int = Field(default=12544, ge=16, description='Points per mask for mask_resolution "points".')

    @property
    def mask_points(self) -> int | None:
        """Points at which masks are compared; None compares all pixels."""
        return self.num_points if self.mask_resolution == "points" else None

    def by_term(self) -> dict[str, float]:
        """The factor of each entry of `sam3lora.losses.LossOutput.terms`."""
        o2o = {
            "loss_bbox": self.bbox,
            "loss_giou": self.giou,
            "loss_ce": self.ce,
            "loss_mask": self.mask,
            "loss_dice": self.dice,
        }
        return {
            **o2o,
            **{f"{name}_o2m": self.o2m * weight for name, weight in o2o.items()},
            "presence_loss": self.presence,
            "loss_semantic_seg": self.semantic,
            "loss_semantic_dice": self.semantic_dice,
        }

    @model_validator(mode="after")
    def _check_effect(self) -> LossSection:
        if self.num_points != type(self).model_fields["num_points"].default and self.mask_resolution != "points":
            raise ValueError(
                f'num_points has no effect with mask_resolution "{self.mask_resolution}": set it to "points"'
            )
        terms = (self.bbox, self.giou, self.ce, self.presence, self.mask, self.dice, self.semantic, self.semantic_dice)
        if not any(terms):
            raise ValueError("has only zero weights, so there is nothing to learn: give one term a positive weight")
        return self
