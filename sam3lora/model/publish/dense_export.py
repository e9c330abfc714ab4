"""Export of a dense folder whose LoRA is merged into the base: a SAM 3 with the head beside it.

The merged folder is both: the base (`Sam3Model.from_pretrained` reads it) and a dense folder without LoRA that belongs
to this base, `Predictor(FOLDER, adapter=FOLDER)`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3lora.errors import UserError
from sam3lora.files import whole_folder
from sam3lora.model.adapter.folder import add_saved_adapter
from sam3lora.model.adapter.folder_files import CONFIG_FILE, HEAD_FILE
from sam3lora.model.adapter.metadata import AdapterMetadata, write_metadata
from sam3lora.model.components import adapted_modules
from sam3lora.model.dense.folder import check_dense_folder, load_dense
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.publish.dense_card import render_dense_card
from sam3lora.model.publish.export import (
    DTYPES,
    ExportReport,
    compare,
    merge_record,
    processor_of,
    size_mb_of,
)
from sam3lora.model.publish.model_card import CARD_FILE


def merge_dense(
    adapter_dir: Path, output_dir: Path, load: Callable[[], tuple[LoadedBase, AdapterMetadata]], dtype: str
) -> ExportReport:
    """As `merge_adapter`, for a folder of task dense; the difference is that of the head's logits.

    Args:
        load: Loads the base, and reads the metadata of the folder.

    Raises:
        UserError: As `merge_adapter`, or the folder has no LoRA.
        RunFailed: As `merge_adapter`.
    """
    check_dense_folder(adapter_dir)
    if not (adapter_dir / CONFIG_FILE).is_file():
        raise UserError(f"{adapter_dir} has no LoRA to merge: leave out --merge to copy it as it is")
    base, metadata = load()
    side, generator = base.resolution, torch.Generator().manual_seed(0)
    pixel_values = torch.rand(1, 3, side, side, generator=generator, dtype=torch.double) * 2 - 1
    expected = _logits(base, adapter_dir, pixel_values)  # nothing but the trunk is left of this base
    base, _ = load()
    peft_model = add_saved_adapter(base.model, adapter_dir)
    num_modules = len(adapted_modules(peft_model))
    merged: Any = peft_model.merge_and_unload(safe_merge=True)
    with whole_folder(output_dir) as folder:
        merged.save_pretrained(folder)
        processor_of(base).save_pretrained(folder)
        shutil.copyfile(adapter_dir / HEAD_FILE, folder / HEAD_FILE)
        beside = replace(
            metadata, base_model=str(output_dir), base_revision=None, base_fingerprint=fingerprint(merged), lora={}
        )
        write_metadata(folder, beside.to_dict())
        differences = compare(expected, _logits(load_base(str(folder)), folder, pixel_values))
        if dtype != "float32":
            merged.to(dtype=DTYPES[dtype]).save_pretrained(folder)
        size_mb = size_mb_of(folder)
        report = ExportReport(
            output_dir, metadata.base_model or base.name, dtype, base.resolution, num_modules, size_mb, differences
        )
        (folder / CARD_FILE).write_text(render_dense_card(metadata, merged=True), encoding="utf-8")
        write_metadata(folder, beside.to_dict() | merge_record(report))
    return report


@torch.no_grad()
def _logits(base: LoadedBase, folder: Path, pixel_values: Tensor) -> dict[str, Tensor]:
    model, _ = load_dense(base, folder)
    return {"logits": model.double()(pixel_values)}
