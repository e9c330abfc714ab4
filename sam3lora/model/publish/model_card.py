"""The README.md of an adapter folder: what it is and how to use it, with this package or without."""

from __future__ import annotations

import json
import re
from typing import Any

from sam3lora.config.post_processing import PostProcessing
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.base_folder import TINY

CARD_FILE = "README.md"


def render_model_card(metadata: AdapterMetadata) -> str:
    """Markdown with the hub's front matter. The code in it is complete and can be pasted."""
    base = metadata.base_model or "unknown"
    front = ["---", "library_name: peft", "pipeline_tag: mask-generation", "tags: [sam3, lora, image-segmentation]"]
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        front.append(f"base_model: {base}")
    prompts = ", ".join(f"`{prompt}`" for prompt in metadata.prompts) or "not recorded"
    revision = f" at revision `{metadata.base_revision}`" if metadata.base_revision else ""
    sections = [
        "\n".join([*front, "---"]),
        "# SAM 3 LoRA adapter",
        f"Teaches [SAM 3](https://huggingface.co/facebook/sam3) these prompts: {prompts}.",
        f"Base model: `{base}`{revision}. Input: {metadata.resolution or 'the model own'} pixels square. "
        f"Geometry CLS token: {'on' if metadata.geometry_cls else 'off'}. A detection's score is "
        "sigmoid(logit) x sigmoid(presence).",
        "## With sam3lora",
        _python(
            "from sam3lora import Predictor",
            f'predictor = Predictor("{base}", adapter="PATH_OF_THIS_FOLDER")',
            f'results = predictor.predict("image.jpg", prompts=["{_first_prompt(metadata)}"])',
        ),
        "## With transformers and PEFT alone",
        _stock_code(metadata, base),
    ]
    post = metadata.post_processing
    for title, values in (
        ("Metrics", metadata.metrics),
        ("Data", metadata.data),
        ("Post-processing", {} if post is None else post.model_dump(mode="json")),
        ("LoRA", metadata.lora),
        ("Versions", metadata.versions),
    ):
        if values:
            sections += [f"## {title}", _table(values)]
    return "\n\n".join(sections) + "\n"


def update_post_processing(card: str, post: PostProcessing) -> str:
    """A model card with other post-processing settings; the rest of it, which somebody may have edited, stays."""
    card = re.sub(r"(post_process_instance_segmentation\(outputs, threshold=)[^,)]+", rf"\g<1>{post.threshold}", card)
    section = f"## Post-processing\n\n{_table(post.model_dump(mode='json'))}\n"
    earlier = re.search(r"^## (Post-processing|Thresholds)\n.*?(?=\n^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if earlier is None:
        return f"{card.rstrip()}\n\n{section}"
    return card[: earlier.start()] + section + card[earlier.end() :]


def _stock_code(metadata: AdapterMetadata, base: str) -> str:
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from PIL import Image",
        "from transformers import Sam3Config, Sam3Model, Sam3Processor",
        "",
    ]
    if base == TINY:
        lines += ["from sam3lora.model.tiny import TINY_FOLDER as base"]
    else:
        lines += [f'base = "{base}"']
    load = "model = Sam3Model.from_pretrained(base)"
    size = metadata.resolution
    if size:
        lines += [
            "config = Sam3Config.from_pretrained(base)",
            'config = getattr(config, "detector_config", None) or config',
            "config = config if isinstance(config, Sam3Config) else Sam3Config(**config)",
            f"config.image_size = {size}",
        ]
        load = "model = Sam3Model.from_pretrained(base, config=config)"
    lines += [
        load,
        'model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER").eval()',
        "processor = Sam3Processor.from_pretrained(base)",
        "",
        'image = Image.open("image.jpg").convert("RGB")',
        f'text = "{_first_prompt(metadata)}"',
        'inputs = processor(images=image, text=text, return_tensors="pt"'
        + (f', size={{"height": {size}, "width": {size}}})' if size else ")"),
    ]
    if metadata.geometry_cls:
        lines += [
            "# One padding box: the geometry encoder then adds its CLS token, as in training, and nothing else.",
            'inputs["input_boxes"] = torch.full((1, 1, 4), -10.0)',
            'inputs["input_boxes_labels"] = torch.full((1, 1), -10)',
        ]
    threshold = (metadata.post_processing or PostProcessing()).threshold
    lines += [
        'sizes = inputs.pop("original_sizes").tolist()',
        "with torch.inference_mode():",
        "    outputs = model(**inputs)",
        f"result = processor.post_process_instance_segmentation(outputs, threshold={threshold}, target_sizes=sizes)[0]",
        'print(result["scores"], result["boxes"], result["masks"].shape)',
    ]
    return _python(*lines)


def _first_prompt(metadata: AdapterMetadata) -> str:
    return (metadata.prompts or ["crack"])[0].replace("\\", "\\\\").replace('"', '\\"')


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(values: dict[str, Any]) -> str:
    rows = ["| | |", "|---|---|"]
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        text = json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else text
        rows.append(f"| {name} | {text.replace('|', '/')} |")
    return "\n".join(rows)
