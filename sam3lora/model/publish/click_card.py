"""The model card of a click adapter."""

from __future__ import annotations

from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.publish.model_card import FOLDER, base_in_words, front_matter, python_block, values_table


def render_click_card(metadata: AdapterMetadata) -> str:
    """The card in Markdown with the hub's front matter."""
    base, origin = metadata.base_model or "unknown", metadata.clicks or {}
    trunk = origin.get("vision_adapter")
    beside = "" if trunk is None else 'adapter="folder of that adapter", '
    seen = "the base" if trunk is None else f"an adapter whose trunk has the digest `{trunk[:12]}`"
    sections = [
        front_matter("peft", base),
        "# LoRA on SAM 3's click head",
        "Corrects outlines by clicks, boxes and masks. It finds nothing by prompts.",
        f"Base model: {base_in_words(metadata, base)}, with its tracker. "
        f"Input: {metadata.resolution or 'the model own'} pixels square. Vision trunk: that of {seen}.",
        "## With sam3lora",
        python_block(
            "from sam3lora import Predictor",
            "",
            f'session = Predictor("{base}", {beside}click_adapter="{FOLDER}").interact("photo.jpg")',
            "session.click([(300, 200)]).mask",
        ),
        "## With transformers and PEFT alone",
        python_block(
            "from peft import PeftModel",
            "from transformers import Sam3VideoModel",
            "",
            f'model = PeftModel.from_pretrained(Sam3VideoModel.from_pretrained("{base}"), "{FOLDER}").eval()',
            "model.tracker_model  # answers clicks, and follows objects in video, with the adapter",
        ),
    ]
    for title, values in (
        ("Metrics", metadata.metrics),
        ("Data", metadata.data),
        ("Trained on", origin),
        ("LoRA", metadata.lora),
        ("Versions", metadata.versions),
    ):
        if values:
            sections += [f"## {title}", values_table(values)]
    return "\n\n".join(sections) + "\n"
