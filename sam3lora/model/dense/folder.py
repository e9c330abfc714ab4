"""Folders of dense runs: the head beside a plain PEFT adapter of the vision trunk, or the head alone.

dense_head.safetensors   the head, and bottlenecks of the trunk if there are any
sam3lora.json            task dense, and the `DenseSettings` with which the model is built again
adapter_config.json, adapter_model.safetensors   the LoRA of the trunk, where there is one
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import (
    adapter_folder,
    add_saved_adapter,
    check_adapter_folder,
    refuse_other_base,
    write_adapter,
)
from sam3lora.model.adapter.folder_files import CONFIG_FILE, HEAD_FILE, METADATA_FILE
from sam3lora.model.adapter.metadata import (
    CLICKS,
    DENSE,
    AdapterMetadata,
    read_metadata,
    refuse_other_tasks,
    write_metadata,
)
from sam3lora.model.adapter.peft_files import check_finite, check_shapes
from sam3lora.model.components import adapted_modules
from sam3lora.model.dense.model import DenseSam3
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.loading import LoadedBase
from sam3lora.model.publish.dense_card import render_dense_card
from sam3lora.model.publish.model_card import CARD_FILE
from sam3lora.model.staged.trunk import keep_trunk_only


def head_tensors(model: DenseSam3) -> dict[str, Tensor]:
    """What a folder keeps beside the LoRA of the trunk, by name."""
    return {f"head.{name}": tensor for name, tensor in model.dense_head.state_dict().items()} | {
        f"trunk.{name}": parameter for name, parameter in model.bottlenecks().items()
    }


def save_dense(model: DenseSam3, folder: str | Path, metadata: AdapterMetadata) -> Path:
    """Write the folder whole, in place of an adapter that is there already.

    Raises:
        UserError: ``folder`` exists and is no adapter folder.
        ValueError: A weight is not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head_tensors(model).items()}
    check_finite({name: one for name, one in tensors.items() if one.is_floating_point()}, "the head", ValueError)
    with adapter_folder(folder) as scratch:
        if isinstance(model.sam3, PeftModel):
            # PEFT shortens many names to ends, which are unique in the trunk alone: a whole SAM 3 has them elsewhere.
            names = list(adapted_modules(model.sam3))
            write_adapter(model.sam3, scratch, metadata, target_modules=names)
        save_file(tensors, scratch / HEAD_FILE, metadata={"format": "pt"})
        (scratch / HEAD_FILE).chmod(0o644)
        write_metadata(scratch, metadata.to_dict())
        (scratch / CARD_FILE).write_text(render_dense_card(metadata), encoding="utf-8")
    return Path(folder)


def read_dense_metadata(folder: str | Path) -> AdapterMetadata:
    """The metadata of a dense folder, before its base is loaded.

    Raises:
        UserError: The folder is none of task dense, or lacks its head.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    if metadata is not None and metadata.task == CLICKS:
        refuse_other_tasks(metadata, folder)
    if metadata is None or metadata.task != DENSE or metadata.dense is None:
        raise UserError(f"{folder} is not of task dense: expected {HEAD_FILE} and its settings in sam3lora.json")
    if not (folder / HEAD_FILE).is_file():
        raise UserError(f"{folder} lacks {HEAD_FILE}: copy the whole folder again")
    return metadata


def load_dense(base: LoadedBase, folder: str | Path, *, check_base: bool = True) -> tuple[DenseSam3, AdapterMetadata]:
    """The model of a folder on a base, in evaluation mode; the base is changed in place.

    Raises:
        UserError: The folder is none of task dense, is incomplete or damaged, or belongs to another base or resolution.
    """
    folder, metadata = Path(folder), read_dense_metadata(folder)
    assert metadata.dense is not None
    refuse_other_resolution(base, metadata, folder)
    if check_base:
        refuse_other_base(base.model, metadata, folder, fingerprint_of=lambda _: base.fingerprint)
    settings = DenseSettings(**metadata.dense)
    sam3: torch.nn.Module = base.model
    keep_trunk_only(sam3)
    if (folder / CONFIG_FILE).is_file():
        sam3 = add_saved_adapter(base.model, folder)
    model = DenseSam3(sam3, settings).to(next(base.model.parameters()).device)
    _fill(model, folder)
    return model.eval(), metadata


def refuse_other_resolution(base: LoadedBase, metadata: AdapterMetadata, folder: Path) -> None:
    """Raise a UserError for a folder that was trained at another side of the model's input."""
    if metadata.resolution not in (None, base.resolution):
        raise UserError(
            f"{folder} was trained at {metadata.resolution} pixels, the model is loaded at {base.resolution}: load it "
            f"with resolution {metadata.resolution}"
        )


def check_dense_folder(folder: str | Path) -> None:
    """Read and check all files of a dense folder, without a model.

    Raises:
        UserError: The folder is none of task dense, or a file is missing or damaged, or a weight is not finite.
    """
    folder = Path(folder)
    metadata = read_dense_metadata(folder)
    assert metadata.dense is not None
    DenseSettings(**metadata.dense)
    _read_head(folder)
    if (folder / CONFIG_FILE).is_file():
        check_adapter_folder(folder)


def _fill(model: DenseSam3, folder: Path) -> None:
    found, expected = _read_head(folder), head_tensors(model)
    check_shapes(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: tensor.shape for name, tensor in found.items()},
        folder,
        file=HEAD_FILE,
        settings=METADATA_FILE,
    )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])


def _read_head(folder: Path) -> dict[str, Tensor]:
    try:
        found = load_file(folder / HEAD_FILE)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{folder / HEAD_FILE} is damaged: {error}") from None
    weights = {name: one for name, one in found.items() if one.is_floating_point()}
    check_finite(weights, str(folder / HEAD_FILE), UserError)
    return found
