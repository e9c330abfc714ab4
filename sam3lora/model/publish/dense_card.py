"""The model card of a dense folder."""

from __future__ import annotations

from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.publish.model_card import FOLDER, base_in_words, front_matter, python_block, values_table

_MERGED = ", with the LoRA of the vision trunk merged into it; its licence holds for these weights too"


def render_dense_card(metadata: AdapterMetadata, *, merged: bool = False) -> str:
    """The card in Markdown with the hub's front matter; ``merged`` if the folder holds its base as well."""
    base, dense = metadata.base_model or "unknown", metadata.dense or {}
    classes = ", ".join(f"`{name}`" for name in dense.get("classes", ()))
    sections = [
        front_matter("sam3lora", base, "image-segmentation"),
        "# A dense head on SAM 3's vision trunk",
        f"Labels each pixel of an image ({dense.get('mode')}): {classes}. It takes no prompt.",
        f"Base model: {base_in_words(metadata, base)}{_MERGED if merged else ''}. "
        f"Input: {metadata.resolution or 'the model own'} pixels square.",
        "## With sam3lora",
        python_block(
            "from sam3lora import Predictor",
            f'predictor = Predictor("{FOLDER if merged else base}", adapter="{FOLDER}")',
            'result = predictor.predict_dense("image.jpg")',
            "print(result.classes, result.label_HW)",
        ),
    ]
    for title, values in (
        ("Metrics", metadata.metrics),
        ("Data", metadata.data),
        ("Head", dense),
        ("LoRA", metadata.lora),
        ("Versions", metadata.versions),
    ):
        if values:
            sections += [f"## {title}", values_table(values)]
    return "\n\n".join(sections) + "\n"
