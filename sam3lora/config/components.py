"""The named parts of SAM 3 that flags, learning rates, tables and checkpointing refer to."""

from __future__ import annotations

COMPONENT_ROOTS: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("vision_encoder",),
    "text_encoder": ("text_encoder", "text_projection"),
    "geometry_encoder": ("geometry_encoder",),
    "detr_encoder": ("detr_encoder",),
    "detr_decoder": ("detr_decoder",),
    "mask_decoder": ("mask_decoder",),
    "scoring": ("dot_product_scoring",),
}
"""Component -> the children of Sam3Model it consists of. The top-level `text_projection` maps text features to the
detector's width and is used; the CLIP tower's own `text_encoder.text_projection` is not."""

COMPONENTS = tuple(COMPONENT_ROOTS)
