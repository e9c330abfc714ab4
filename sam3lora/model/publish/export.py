"""Exporting an adapter: merged into its base model for plain transformers, or copied as it is.

A merged folder holds what ``Sam3Model.from_pretrained`` and ``Sam3Processor.from_pretrained`` read, a model card, and
the adapter's ``sam3lora.json`` with the figures of the merge beside its own.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Sam3ImageProcessor, Sam3Processor

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import RunFailed, UserError
from sam3lora.files import replace_folder, sync_files
from sam3lora.model.adapter.folder import is_adapter_folder, load_adapter
from sam3lora.model.adapter.lora_layers import adapted_modules
from sam3lora.model.adapter.metadata import AdapterMetadata, read_metadata, write_metadata
from sam3lora.model.base_folder import TINY
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.publish.hub import check_folder, is_merged_folder
from sam3lora.model.publish.model_card import CARD_FILE
from sam3lora.model.tokenization import tokenize

TOLERANCE = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OUTPUTS = {"logits": "pred_logits", "presence": "presence_logits", "boxes": "pred_boxes", "masks": "pred_masks"}


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of an output between two models, and the output's largest absolute value."""

    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        return self.absolute / self.scale if self.scale else self.absolute


@dataclass(frozen=True)
class ExportReport:
    """A merged model, and how what its files compute differs from base plus adapter.

    ``differences`` has ``logits``, ``presence``, ``boxes`` (units of the input's sides) and ``masks`` (logits) for one
    image of random pixels and the adapter's first prompt, of float32 weights in float64 arithmetic.
    """

    folder: Path
    base_model: str
    dtype: str
    resolution: int
    num_modules: int
    size_mb: float
    differences: dict[str, Difference]

    @property
    def check(self) -> str:
        """What was compared, in words."""
        cast = "" if self.dtype == "float32" else f", before their cast to {self.dtype},"
        return f"the merged files{cast} against base plus adapter"


def merge_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    local_files_only: bool = False,
) -> ExportReport:
    """Write base plus adapter as one SAM 3 at the adapter's resolution, once it is shown to compute the same.

    Args:
        output_dir: new, empty, or an earlier merged model, which is replaced when the new one is complete.
        model, revision: the base model; None takes the one that the adapter's metadata name.
        dtype: of the weights written, ``float32`` or ``bfloat16``.
        local_files_only: use the hub's local cache only.

    Raises:
        UserError: an incomplete adapter, no base model or another one, an unknown ``dtype``, or ``output_dir`` holds
            something else.
        RunFailed: an output of the merged model is off by more than 1e-5 of its scale; nothing is written then.
    """
    output_dir = Path(output_dir).resolve()
    if dtype not in DTYPES:
        raise UserError(f"the dtype of a merged model must be {' or '.join(DTYPES)}, got {dtype!r}")
    if is_merged_folder(adapter_dir):
        raise UserError(f"{adapter_dir} is a merged model already: expected an adapter folder")
    _check_target(output_dir, is_merged_folder, "merged model")
    base, metadata = _load_base_of(adapter_dir, model, revision, local_files_only)
    if base.name != TINY and Path(base.name).expanduser().resolve() == output_dir:
        raise UserError(f"{output_dir} is the base model itself: choose another place for the merged one")

    peft_model, _ = load_adapter(base.model, adapter_dir)
    num_modules = len(adapted_modules(peft_model))
    inputs = _check_inputs(base, metadata)
    expected = _outputs(peft_model, inputs)
    merged = peft_model.merge_and_unload(safe_merge=True)
    with _complete_or_absent(output_dir) as folder:
        merged.save_pretrained(folder)
        _processor(base).save_pretrained(folder)
        reloaded = load_base(str(folder)).model
        differences = _compare(expected, _outputs(reloaded, inputs))
        if dtype != "float32":
            reloaded.to(dtype=DTYPES[dtype]).save_pretrained(folder)  # type: ignore[call-arg]
            if load_base(str(folder), dtype=dtype).fingerprint != fingerprint(merged):
                raise RunFailed(f"the weights written in {dtype} are not the merged ones; nothing was kept")
        weights = list(folder.glob("*.safetensors"))
        for file in weights:
            file.chmod((folder / "config.json").stat().st_mode)  # safetensors makes them readable by the owner alone
        size_mb = sum(file.stat().st_size for file in weights) / 1e6
        report = ExportReport(
            output_dir, metadata.base_model or base.name, dtype, base.resolution, num_modules, size_mb, differences
        )
        _describe(folder, report, metadata)
    return report


def copy_adapter(adapter_dir: str | Path, output_dir: str | Path) -> Path:
    """Copy a complete adapter folder to one that is new, empty, or an adapter folder, which is replaced.

    Raises:
        UserError: the adapter is incomplete, or ``output_dir`` holds something else.
    """
    adapter_dir, output_dir = Path(adapter_dir).resolve(), Path(output_dir).resolve()
    files = check_folder(adapter_dir)
    if is_merged_folder(adapter_dir) or output_dir == adapter_dir:
        raise UserError(f"cannot copy {adapter_dir} to {output_dir}: expected an adapter folder and another place")
    _check_target(output_dir, is_adapter_folder, "adapter folder")
    with _complete_or_absent(output_dir) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
    return output_dir


def _check_target(folder: Path, is_replaceable: Callable[[Path], bool], kind: str) -> None:
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not is_replaceable(folder):
        raise UserError(f"{folder} exists and is no {kind}: choose another place or remove it")


def _load_base_of(
    adapter_dir: str | Path, model: str | None, revision: str | None, local_files_only: bool
) -> tuple[LoadedBase, AdapterMetadata]:
    if not is_adapter_folder(adapter_dir):
        check_folder(adapter_dir)  # says what is wrong with it
    metadata = read_metadata(adapter_dir) or AdapterMetadata()
    name = model or metadata.base_model
    if name is None:
        raise UserError(f"{adapter_dir} does not say which base model it belongs to: name it with --model")
    if name == metadata.base_model:
        revision = revision or metadata.base_revision
    base = load_base(name, revision=revision, local_files_only=local_files_only, resolution=metadata.resolution)
    return base, metadata


@contextlib.contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path]:
    """A scratch folder beside ``folder`` that takes its place if the block ends well, and goes away if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    scratch.mkdir()
    try:
        yield scratch
        sync_files(scratch)
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _processor(base: LoadedBase) -> Sam3Processor:
    config = base.model.config.vision_config.backbone_config  # type: ignore[union-attr]
    mask_side = base.resolution // config.patch_size * 4  # type: ignore[union-attr,operator]
    image_processor = Sam3ImageProcessor(
        size={"height": base.resolution, "width": base.resolution},
        mask_size={"height": mask_side, "width": mask_side},
        image_mean=list(base.image_mean),
        image_std=list(base.image_std),
    )
    return Sam3Processor(image_processor=image_processor, tokenizer=base.tokenizer)


def _check_inputs(base: LoadedBase, metadata: AdapterMetadata) -> dict[str, Tensor]:
    """Inputs of the stock forward for one image of random pixels (1, 3, H, W), in float64, and one prompt."""
    ids, attention_mask = tokenize(base.tokenizer, (metadata.prompts or ["thing"])[:1])
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(1, 3, base.resolution, base.resolution, generator=generator, dtype=torch.double) * 2 - 1
    inputs = {"pixel_values": pixel_values, "input_ids": ids, "attention_mask": attention_mask}
    if metadata.geometry_cls:
        inputs |= {
            "input_boxes": torch.full((1, 1, 4), -10.0, dtype=torch.double),
            "input_boxes_labels": torch.full((1, 1), -10),
        }
    return inputs


@torch.no_grad()
def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64: in float32 rounding alone makes the logits of a full-size model differ by 2e-5 of their scale."""
    found = model.double()(**inputs)
    model.float()
    return {name: getattr(found, attribute) for name, attribute in _OUTPUTS.items()}


def _compare(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Difference]:
    differences = {
        name: Difference((found[name] - value).abs().max().item(), value.abs().max().item())
        for name, value in expected.items()
    }
    if not all(difference.relative <= TOLERANCE for difference in differences.values()):  # NaN fails too
        figures = ", ".join(f"{name} {item.absolute:.2g} of {item.scale:.2g}" for name, item in differences.items())
        raise RunFailed(
            f"the merged model differs from base plus adapter by more than {TOLERANCE:.0e} of an output's scale: "
            f"{figures}. Nothing was kept"
        )
    return differences


def _describe(folder: Path, report: ExportReport, metadata: AdapterMetadata) -> None:
    """Add model card and metadata, the file that tells a merged model, last."""
    (folder / CARD_FILE).write_text(_render_card(report, metadata), encoding="utf-8")
    metadata = replace(metadata, base_model=report.base_model, resolution=report.resolution)
    merge = {
        "dtype": report.dtype,
        "num_modules": report.num_modules,
        "check": report.check,
        "differences": {name: asdict(difference) for name, difference in report.differences.items()},
    }
    write_metadata(folder, metadata.to_dict() | {"merge": merge})


def _render_card(report: ExportReport, metadata: AdapterMetadata) -> str:
    is_on_hub = report.base_model.count("/") == 1 and not report.base_model.startswith((".", "/", "~"))
    cls = (
        "# One padding box: the geometry encoder then adds its CLS token, as in training, and nothing else.\n"
        'inputs["input_boxes"] = torch.full((1, 1, 4), -10.0)\n'
        'inputs["input_boxes_labels"] = torch.full((1, 1), -10)\n'
    )
    rows = "\n".join(
        f"| {name} | {item.absolute:.2g} | {item.scale:.3g} |" for name, item in report.differences.items()
    )
    numbers = {name: value for name, value in metadata.metrics.items() if isinstance(value, int | float)}
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in numbers.items())
    return _CARD.format(
        front=f"\nbase_model: {report.base_model}" if is_on_hub else "",
        prompts=", ".join(f"`{prompt}`" for prompt in metadata.prompts) or "not recorded",
        prompt=json.dumps((metadata.prompts or ["crack"])[0], ensure_ascii=False),
        base=report.base_model,
        revision=f" at revision `{metadata.base_revision}`" if metadata.base_revision else "",
        dtype=report.dtype,
        side=report.resolution,
        cls_state="on" if metadata.geometry_cls else "off",
        cls=cls if metadata.geometry_cls else "",
        threshold=(metadata.post_processing or PostProcessing()).threshold,
        check=report.check,
        rows=rows,
        metrics=f"\n## Metrics\n\n| | |\n|---|---|\n{metrics}\n" if metrics else "",
    )


_CARD = """\
---
library_name: transformers
pipeline_tag: mask-generation
tags: [sam3, lora, image-segmentation]{front}
---

# SAM 3 with a merged LoRA adapter

[SAM 3](https://huggingface.co/facebook/sam3) that was taught these prompts: {prompts}.

Base model: `{base}`{revision}, whose licence holds for these weights too. Weights in {dtype}; input {side} pixels
square; geometry CLS token {cls_state}. A detection's score is sigmoid(logit) x sigmoid(presence).

## With transformers alone

```python
import torch
from PIL import Image
from transformers import Sam3Model, Sam3Processor

model = Sam3Model.from_pretrained("PATH_OF_THIS_FOLDER", dtype=torch.float32).eval()
processor = Sam3Processor.from_pretrained("PATH_OF_THIS_FOLDER")
image = Image.open("image.jpg").convert("RGB")
inputs = processor(images=image, text={prompt}, return_tensors="pt")
{cls}sizes = inputs.pop("original_sizes").tolist()
with torch.inference_mode():
    outputs = model(**inputs)
result = processor.post_process_instance_segmentation(outputs, threshold={threshold}, target_sizes=sizes)[0]
print(result["scores"], result["boxes"], result["masks"].shape)
```

## How exact the merge is

Largest differences of {check}, for one image of random pixels:

| output | difference | largest value |
|---|---|---|
{rows}
{metrics}"""
