"""Export of an adapter: merged into its base model, for plain transformers, or copied as it is.

A merged folder holds the files that ``Sam3Model.from_pretrained`` and ``Sam3Processor.from_pretrained`` read, a model
card, and the adapter's ``sam3lora.json`` with the differences that the merge was checked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam3ImageProcessor, Sam3Processor

from sam3lora.errors import RunFailed, UserError
from sam3lora.files import whole_folder
from sam3lora.model.adapter.folder import is_adapter_folder, load_adapter
from sam3lora.model.adapter.metadata import AdapterMetadata, is_dense_folder, read_metadata, write_metadata
from sam3lora.model.components import adapted_modules
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.publish.hub import check_folder, is_merged_folder
from sam3lora.model.publish.model_card import CARD_FILE, render_merged_card
from sam3lora.model.tiny import TINY
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
    """A merged model, and how its outputs differ from those of base plus adapter.

    ``differences`` are those of ``logits``, ``presence``, ``boxes`` (in units of the input's sides) and ``masks``
    (logits) for one image of random pixels and the adapter's first prompt: float32 weights, float64 arithmetic.
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
        """The comparison in words."""
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
    """Write base plus adapter as one SAM 3 at the adapter's resolution, and check that it computes the same.

    ``output_dir`` is a new or empty folder, or an earlier merged model, which is replaced when the new one is complete.
    ``model`` None takes the base that the adapter's metadata name. ``dtype`` is ``float32`` or ``bfloat16``. The head
    of a dense folder is written beside the model; see `dense_export`.

    Raises:
        UserError: The adapter is incomplete, the base model is missing or another one, ``dtype`` is unknown, or
            ``output_dir`` holds something else.
        RunFailed: An output of the merged model is off by more than 1e-5 of its scale; nothing is written then.
    """
    output_dir = Path(output_dir).resolve()
    if dtype not in DTYPES:
        raise UserError(f"the dtype of a merged model must be {' or '.join(DTYPES)}, got {dtype!r}")
    if is_merged_folder(adapter_dir):
        raise UserError(f"{adapter_dir} is a merged model already: expected an adapter folder")
    _check_target(output_dir, is_merged_folder, "merged model")

    def load() -> tuple[LoadedBase, AdapterMetadata]:
        base, metadata = _load_base_of(adapter_dir, model, revision, local_files_only)
        if base.name != TINY and Path(base.name).expanduser().resolve() == output_dir:
            raise UserError(f"{output_dir} is the base model itself: choose another place for the merged one")
        return base, metadata

    if is_dense_folder(adapter_dir):
        from sam3lora.model.publish.dense_export import merge_dense  # which uses this module

        return merge_dense(Path(adapter_dir), output_dir, load, dtype)
    base, metadata = load()
    peft_model, _ = load_adapter(base.model, adapter_dir)
    num_modules = len(adapted_modules(peft_model))
    inputs = _check_inputs(base, metadata)
    expected = _outputs(peft_model, inputs)
    merged = peft_model.merge_and_unload(safe_merge=True)
    with whole_folder(output_dir) as folder:
        merged.save_pretrained(folder)
        processor_of(base).save_pretrained(folder)
        reloaded = load_base(str(folder)).model
        differences = compare(expected, _outputs(reloaded, inputs))
        if dtype != "float32":
            reloaded.to(dtype=DTYPES[dtype]).save_pretrained(folder)  # type: ignore[call-arg]
            if load_base(str(folder), dtype=dtype).fingerprint != fingerprint(merged):
                raise RunFailed(f"the weights written in {dtype} are not the merged ones; nothing was kept")
        size_mb = size_mb_of(folder)
        report = ExportReport(
            output_dir, metadata.base_model or base.name, dtype, base.resolution, num_modules, size_mb, differences
        )
        _describe(folder, report, metadata)
    return report


def size_mb_of(folder: Path) -> float:
    """The size of the weights of a merged folder, which all that can read the folder then may read."""
    weights = list(folder.glob("*.safetensors"))
    for file in weights:
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read them
    return sum(file.stat().st_size for file in weights) / 1e6


def copy_adapter(adapter_dir: str | Path, output_dir: str | Path) -> Path:
    """Copy a complete adapter folder to a new or empty folder, or in place of another adapter.

    Raises:
        UserError: The adapter is incomplete, or ``output_dir`` holds something else.
    """
    adapter_dir, output_dir = Path(adapter_dir).resolve(), Path(output_dir).resolve()
    files = check_folder(adapter_dir)
    if is_merged_folder(adapter_dir) or output_dir == adapter_dir:
        raise UserError(f"cannot copy {adapter_dir} to {output_dir}: expected an adapter folder and another place")
    _check_target(output_dir, is_adapter_folder, "adapter folder")
    with whole_folder(output_dir) as folder:
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
        check_folder(adapter_dir)  # raises with the reason
    metadata = read_metadata(adapter_dir) or AdapterMetadata()
    name = model or metadata.base_model
    if name is None:
        raise UserError(f"{adapter_dir} does not say which base model it belongs to: name it with --model")
    if name == metadata.base_model:
        revision = revision or metadata.base_revision
    base = load_base(name, revision=revision, local_files_only=local_files_only, resolution=metadata.resolution)
    return base, metadata


def processor_of(base: LoadedBase) -> Sam3Processor:
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
    """Inputs of the stock forward: one image of random pixels (1, 3, H, W) in float64, and one prompt."""
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
    """Outputs in float64 arithmetic: rounding in float32 changes a full-size model's logits by 2e-5 of their scale."""
    found = model.double()(**inputs)
    model.float()
    return {name: getattr(found, attribute) for name, attribute in _OUTPUTS.items()}


def compare(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Difference]:
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
    """Add the model card and the metadata; the metadata come last, as they mark the folder as a merged model."""
    (folder / CARD_FILE).write_text(render_merged_card(report, metadata), encoding="utf-8")
    metadata = replace(metadata, base_model=report.base_model, resolution=report.resolution)
    write_metadata(folder, metadata.to_dict() | merge_record(report))


def merge_record(report: ExportReport) -> dict[str, Any]:
    """What the metadata of a merged folder tell of the merge."""
    merge = {
        "dtype": report.dtype,
        "num_modules": report.num_modules,
        "check": report.check,
        "differences": {name: asdict(difference) for name, difference in report.differences.items()},
    }
    return {"merge": merge}
