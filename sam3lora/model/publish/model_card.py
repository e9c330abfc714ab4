"""Model cards: the README.md of an adapter folder and of a merged model, with code that can be pasted."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from sam3lora.config.post_processing import PostProcessing
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.tiny import TINY

if TYPE_CHECKING:
    from sam3lora.model.publish.export import ExportReport

CARD_FILE = "README.md"
FOLDER = "PATH_OF_THIS_FOLDER"
_SCORE = "A detection's score is sigmoid(logit) x sigmoid(presence)."


def render_model_card(metadata: AdapterMetadata) -> str:
    """The card of an adapter, in Markdown with the hub's front matter."""
    base = metadata.base_model or "unknown"
    post = metadata.post_processing
    sections = [
        front_matter("peft", base),
        "# SAM 3 LoRA adapter",
        f"Teaches [SAM 3](https://huggingface.co/facebook/sam3) these prompts: {_prompts(metadata)}.",
        f"Base model: {base_in_words(metadata, base)}. Input: {metadata.resolution or 'the model own'} pixels square. "
        f"Geometry CLS token: {_cls_state(metadata)}. {_SCORE}",
        "## With sam3lora",
        python_block(
            "from sam3lora import Predictor",
            f'predictor = Predictor("{base}", adapter="{FOLDER}")',
            f'results = predictor.predict("image.jpg", prompts=[{_first_prompt(metadata)}])',
        ),
        "## With transformers and PEFT alone",
        python_block(
            "import torch",
            "from peft import PeftModel",
            "from PIL import Image",
            "from transformers import Sam3Config, Sam3Model, Sam3Processor",
            "",
            *_load_base_and_adapter(metadata, base),
            *_detect(metadata, metadata.resolution),
        ),
    ]
    for title, values in (
        ("Metrics", metadata.metrics),
        ("Data", metadata.data),
        ("Post-processing", {} if post is None else post.model_dump(mode="json")),
        ("LoRA", metadata.lora),
        ("Versions", metadata.versions),
    ):
        if values:
            sections += [f"## {title}", values_table(values)]
    return "\n\n".join(sections) + "\n"


def render_merged_card(report: ExportReport, metadata: AdapterMetadata) -> str:
    """The card of a merged model, in Markdown with the hub's front matter."""
    rows = [f"| {name} | {item.absolute:.2g} | {item.scale:.3g} |" for name, item in report.differences.items()]
    sections = [
        front_matter("transformers", report.base_model),
        "# SAM 3 with a merged LoRA adapter",
        f"[SAM 3](https://huggingface.co/facebook/sam3) that was taught these prompts: {_prompts(metadata)}.",
        f"Base model: {base_in_words(metadata, report.base_model)}, whose licence holds for these weights too. Weights "
        f"in {report.dtype}; input {report.resolution} pixels square; geometry CLS token {_cls_state(metadata)}. "
        f"{_SCORE}",
        "## With transformers alone",
        python_block(
            "import torch",
            "from PIL import Image",
            "from transformers import Sam3Model, Sam3Processor",
            "",
            f'model = Sam3Model.from_pretrained("{FOLDER}", dtype=torch.float32).eval()',
            f'processor = Sam3Processor.from_pretrained("{FOLDER}")',
            *_detect(metadata, None),
        ),
        "## How exact the merge is",
        f"Largest differences of {report.check}, for one image of random pixels:",
        "\n".join(["| output | difference | largest value |", "|---|---|---|", *rows]),
    ]
    if numbers := {name: value for name, value in metadata.metrics.items() if isinstance(value, int | float)}:
        sections += ["## Metrics", values_table(numbers)]
    return "\n\n".join(sections) + "\n"


def update_post_processing(card: str, post: PostProcessing) -> str:
    """A card with other post-processing settings; the rest of the text, which somebody may have edited, stays."""
    card = re.sub(r"(post_process_instance_segmentation\(outputs, threshold=)[^,)]+", rf"\g<1>{post.threshold}", card)
    section = f"## Post-processing\n\n{values_table(post.model_dump(mode='json'))}\n"
    # "Thresholds" is the heading that earlier versions wrote.
    earlier = re.search(r"^## (Post-processing|Thresholds)\n.*?(?=\n^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if earlier is None:
        return f"{card.rstrip()}\n\n{section}"
    return card[: earlier.start()] + section + card[earlier.end() :]


def front_matter(library: str, base: str, pipeline: str = "mask-generation") -> str:
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {pipeline}"]
    lines.append("tags: [sam3, lora, image-segmentation]")
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):  # a name on the hub
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---"])


def _load_base_and_adapter(metadata: AdapterMetadata, base: str) -> list[str]:
    lines = ["from sam3lora.model.tiny import TINY_FOLDER as base"] if base == TINY else [f'base = "{base}"']
    load = "model = Sam3Model.from_pretrained(base)"
    if metadata.resolution:
        lines += [
            "config = Sam3Config.from_pretrained(base)",
            'config = getattr(config, "detector_config", None) or config',
            "config = config if isinstance(config, Sam3Config) else Sam3Config(**config)",
            f"config.image_size = {metadata.resolution}",
        ]
        load = "model = Sam3Model.from_pretrained(base, config=config)"
    peft = f'model = PeftModel.from_pretrained(model, "{FOLDER}").eval()'
    return [*lines, load, peft, "processor = Sam3Processor.from_pretrained(base)", ""]


def _detect(metadata: AdapterMetadata, size: int | None) -> list[str]:
    """Lines that run `model` on an image and print its detections; `size` replaces the processor's own."""
    arguments = 'images=image, text=text, return_tensors="pt"'
    if size:
        arguments += f', size={{"height": {size}, "width": {size}}}'
    lines = [
        'image = Image.open("image.jpg").convert("RGB")',
        f"text = {_first_prompt(metadata)}",
        f"inputs = processor({arguments})",
    ]
    if metadata.geometry_cls:
        lines += [
            "# One padding box: the geometry encoder then adds its CLS token, as in training, and nothing else.",
            'inputs["input_boxes"] = torch.full((1, 1, 4), -10.0)',
            'inputs["input_boxes_labels"] = torch.full((1, 1), -10)',
        ]
    threshold = (metadata.post_processing or PostProcessing()).threshold
    return [
        *lines,
        'sizes = inputs.pop("original_sizes").tolist()',
        "with torch.inference_mode():",
        "    outputs = model(**inputs)",
        f"result = processor.post_process_instance_segmentation(outputs, threshold={threshold}, target_sizes=sizes)[0]",
        'print(result["scores"], result["boxes"], result["masks"].shape)',
    ]


def _prompts(metadata: AdapterMetadata) -> str:
    return ", ".join(f"`{prompt}`" for prompt in metadata.prompts) or "not recorded"


def base_in_words(metadata: AdapterMetadata, base: str) -> str:
    return f"`{base}`" + (f" at revision `{metadata.base_revision}`" if metadata.base_revision else "")


def _cls_state(metadata: AdapterMetadata) -> str:
    return "on" if metadata.geometry_cls else "off"


def _first_prompt(metadata: AdapterMetadata) -> str:
    """As a Python string."""
    return json.dumps((metadata.prompts or ["crack"])[0], ensure_ascii=False)


def python_block(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def values_table(values: dict[str, Any]) -> str:
    rows = ["| | |", "|---|---|"]
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        text = json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else text
        rows.append(f"| {name} | {text.replace('|', '/')} |")
    return "\n".join(rows)
