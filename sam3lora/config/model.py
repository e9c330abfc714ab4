"""Settings of the frozen base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ._section import LocalPath, Section


class ModelSection(Section):
    """The frozen base model."""

    name: LocalPath = Field(
        default="facebook/sam3",
        min_length=1,
        description='Base model: a Hugging Face id, a local folder, or "tiny" (the built-in small SAM 3 for a CPU).',
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the Hugging Face id; None = main.")
    resolution: int | None = Field(
        default=None, ge=14, le=4032, description="Side of the square model input in pixels; None = the model's own."
    )
    geometry_cls: bool = Field(
        default=True,
        description="Give the model the geometry CLS token beside the text, as the original SAM 3 always does.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type the frozen weights are kept in; bfloat16 halves their memory."
    )
    local_files_only: bool = Field(default=False, description="Never ask the Hugging Face hub; use its cache only.")
    attention: Literal["sdpa", "eager"] = Field(
        default="sdpa", description="Attention implementation; sdpa is the faster one and needs less memory."
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="Keep the frozen linear layers of vision trunk and DETR in 4 bits while training, by bitsandbytes.",
    )
