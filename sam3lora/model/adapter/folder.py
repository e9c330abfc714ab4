"""Adapter folders: saving an adapter, loading it into a model with PEFT, listing and checking folders.

A folder holds plain PEFT files (``adapter_config.json``, ``adapter_model.safetensors``), which load with
``PeftModel.from_pretrained`` and no code of ours, ``sam3lora.json`` and a model card.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.files import whole_folder, write_whole
from sam3lora.model.adapter.folder_files import CONFIG_FILE, FILES, WEIGHTS_FILE, is_adapter_folder, shown
from sam3lora.model.adapter.lora_products import take_over
from sam3lora.model.adapter.metadata import (
    AdapterMetadata,
    check_prompt_thresholds,
    read_metadata,
    read_metadata_values,
    refuse_other_tasks,
    write_metadata,
)
from sam3lora.model.adapter.peft_config import read_config
from sam3lora.model.adapter.peft_files import check_finite, check_shapes, read_header, read_tensors, tensor_name
from sam3lora.model.adapter.target_modules import ValuesByName, adapted_names, base_modules, exactly
from sam3lora.model.components import unwrap
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.publish.model_card import CARD_FILE, render_model_card, update_post_processing

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "AdapterMetadata",
    "is_adapter_folder",
    "list_adapters",
    "load_adapter",
    "read_metadata",
    "save_adapter",
]

_ATTEMPTS_TO_READ = 3

T = TypeVar("T")
FolderSignature = tuple[tuple[int, ...] | None, ...]
"""Equal as long as no file of an adapter folder is replaced or written to."""


def save_adapter(
    model: PeftModel, folder: str | Path, metadata: AdapterMetadata | None = None, *, adapter_name: str = "default"
) -> Path:
    """Write an adapter to ``folder``, replacing an adapter that is there already.

    The folder is written beside its place and renamed: a reader, at any moment and after any crash, finds a complete
    adapter or none. Without ``metadata`` (a model that is not a SAM 3) only the PEFT files are written.

    Raises:
        UserError: ``folder`` exists and is no adapter folder, so replacing it could destroy something.
        ValueError: The model has no such adapter, or its weights are not finite.
    """
    with adapter_folder(folder) as scratch:
        write_adapter(model, scratch, metadata, adapter_name=adapter_name)
        if metadata is not None:
            write_metadata(scratch, metadata.to_dict())
            (scratch / CARD_FILE).write_text(render_model_card(metadata), encoding="utf-8")
    return Path(folder)


@contextmanager
def adapter_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write an adapter to, which takes the place of ``folder`` when it is whole.

    Raises:
        UserError: ``folder`` exists and is no adapter folder, so replacing it could destroy something.
    """
    folder = Path(folder)
    if folder.exists() and not (is_adapter_folder(folder) or (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder} exists and is no adapter folder: choose another place or remove it")
    with whole_folder(folder) as scratch:
        yield scratch


def write_adapter(
    model: PeftModel,
    scratch: Path,
    metadata: AdapterMetadata | None,
    *,
    adapter_name: str = "default",
    target_modules: list[str] | None = None,
) -> None:
    """Write the two files of PEFT into a folder, with the configuration's own target modules or these.

    Raises:
        ValueError: The model has no such adapter, or its weights are not finite.
    """
    if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
        raise ValueError(f"expected a PEFT model with an adapter {adapter_name!r}, got {type(model).__name__}")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    check_finite(tensors, "the adapter in memory", ValueError)

    config: Any = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    config.target_modules = target_modules or config.target_modules
    config.base_model_name_or_path = (metadata.base_model if metadata else None) or config.base_model_name_or_path
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))

    save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(scratch))
    # safetensors lets only the owner read its file; other accounts that can read the folder may serve the adapter.
    shutil.copymode(scratch / CONFIG_FILE, scratch / WEIGHTS_FILE)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    check_base: bool = True,
    adapter_name: str = "default",
    trainable: bool = False,
) -> tuple[PeftModel, AdapterMetadata | None]:
    """Load an adapter into a base model, or one more into a PEFT model; the model is changed in place.

    ``check_base`` refuses a base whose fingerprint differs from that of the base the adapter was trained on. The first
    adapter of a model becomes the active one. A plain PEFT adapter has no metadata.

    Raises:
        UserError: The folder is incomplete or damaged, the base is another one, or tensors are missing or left over.
            The model is then as it was before.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    refuse_other_tasks(metadata, folder)
    if check_base and metadata is not None:
        refuse_other_base(model, metadata, folder)
    return add_saved_adapter(model, folder, adapter_name=adapter_name, trainable=trainable), metadata


def add_saved_adapter(
    model: nn.Module, folder: Path, *, adapter_name: str = "default", trainable: bool = False
) -> PeftModel:
    """`load_adapter` of PEFT's two files alone."""
    config = read_config(folder)
    modules = base_modules(unwrap(model))
    _check_ranks(config, modules, folder)
    tensors, _ = read_tensors(folder)

    config.inference_mode = not trainable
    shared = model if isinstance(model, PeftModel) else None
    if shared is not None and adapter_name in shared.peft_config:
        raise ValueError(f"the model already has an adapter {adapter_name!r}: delete it first or use another name")
    try:
        with exactly(config, modules), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks by the old name
            if shared is not None:
                peft_model = shared
                peft_model.add_adapter(adapter_name, config)
            else:
                config.base_model_name_or_path = getattr(unwrap(model), "name_or_path", None) or None
                peft_model = cast(PeftModel, get_peft_model(model, config, adapter_name=adapter_name))  # type: ignore
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # the configuration may ask for anything
        raise UserError(f"{folder} does not fit {type(unwrap(model)).__name__}: {error}") from error
    take_over(peft_model)
    try:
        _fill(peft_model, adapter_name, tensors, folder)
    except UserError:
        if shared is not None:
            peft_model.delete_adapter(adapter_name)
        else:
            peft_model.unload()
        raise
    return peft_model.eval() if not trainable else peft_model


def record_post_processing(folder: str | Path, post: PostProcessing) -> None:
    """Write post-processing settings into the metadata and the model card of an adapter folder.

    They are then the defaults wherever the adapter is used. All other values and the text of the card stay.

    Raises:
        UserError: The folder holds no complete adapter, its metadata are damaged, or there are too many thresholds.
    """
    folder = Path(folder)
    check_prompt_thresholds(post)
    if not is_adapter_folder(folder):
        raise UserError(f"{folder} is no adapter folder: expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    recorded = read_metadata(folder)
    refuse_other_tasks(recorded, folder)
    metadata = replace(recorded or AdapterMetadata(versions={}), post_processing=post)
    # From the file itself: it may have keys of a newer version. The old name of the settings goes.
    values = (read_metadata_values(folder) or {}) | metadata.to_dict()
    values.pop("thresholds", None)
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else render_model_card(metadata)
    write_metadata(folder, values)
    write_whole(card, update_post_processing(text, post))


def check_adapter_folder(folder: str | Path) -> None:
    """Read and check all files of an adapter folder, without a model.

    Raises:
        UserError: A file is missing, damaged or of another kind, or a weight is not finite.
    """
    read_config(Path(folder))
    read_tensors(Path(folder))
    read_metadata(folder)


def folder_signature(folder: str | Path) -> FolderSignature:
    """Device, inode, size and times of each file of an adapter; None for a missing file. Files are not opened."""
    found: list[tuple[int, ...] | None] = []
    for name in FILES:
        try:
            found.append(file_signature((Path(folder) / name).stat()))
        except OSError:
            found.append(None)
    return tuple(found)


def file_signature(file: os.stat_result) -> tuple[int, ...]:
    """What `folder_signature` says of one file."""
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns


def read_unchanged(folder: Path, read: Callable[[FolderSignature], T]) -> T:
    """The result of `read`, all of it from one version of an adapter folder that others may replace meanwhile.

    `read` gets the signature of the version that it reads.

    Raises:
        UserError: `read` failed for a reason that is not a change of the folder, or the folder changed each time.
    """
    for _ in range(_ATTEMPTS_TO_READ):
        signature = folder_signature(folder)
        try:
            result = read(signature)
        except (UserError, OSError) as error:
            # A half-replaced folder fails in many ways: only the failure of an unchanged one counts.
            if folder_signature(folder) != signature:
                continue
            if isinstance(error, OSError):
                raise UserError(f"{folder} cannot be read: {error.strerror}") from error
            raise
        if folder_signature(folder) == signature:
            return result
    raise UserError(f"{folder} changed while it was being read: try again")


def list_adapters(root: str | Path) -> dict[str, Path]:
    """Complete adapters directly in ``root``, as name -> folder, sorted by name; hidden folders are skipped."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"adapter directory {root} does not exist")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name: path for path in folders if is_adapter_folder(path)}


def refuse_other_base(
    model: nn.Module,
    metadata: AdapterMetadata,
    folder: Path,
    *,
    fingerprint_of: Callable[[nn.Module], str] = fingerprint,
) -> None:
    """Raise a UserError if the metadata name a base and ``model`` is another one, by their fingerprints."""
    expected = metadata.base_fingerprint
    if expected is None or (found := fingerprint_of(model)) == expected:
        return
    revision = f" at revision {metadata.base_revision}" if metadata.base_revision else ""
    name = getattr(unwrap(model), "name_or_path", None) or type(unwrap(model)).__name__
    raise UserError(
        f"adapter {folder} was trained on the base {metadata.base_model!r}{revision} (fingerprint {expected[:12]}), "
        f"but this model is {name!r} (fingerprint {found[:12]}): use it with that base"
    )


def _check_ranks(config: LoraConfig, modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Check that the weights file has the configured ranks: PEFT allocates layers before it looks at weights.

    Raises:
        UserError: It has not, or no module is adapted.
    """
    found, ranks, missing = read_header(folder), ValuesByName(config.rank_pattern or {}), []
    names = adapted_names(config, modules)
    if config.target_modules and not names:
        raise UserError(f"{folder} does not fit this model: its target_modules match no module of it")
    for name in names:
        expected = tensor_name(name, "lora_A.weight")
        entry = found.get(expected) or found.get(tensor_name(name, "lora_embedding_A"))
        rank = ranks.get(name, config.r)
        if entry is None:
            missing.append(expected)
        elif not isinstance(entry.shape, list) or rank not in entry.shape[:1]:
            raise UserError(
                f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {expected} has shape {shown(entry.shape)}, the "
                f"configuration says rank {rank}"
            )
    if missing:
        check_shapes(dict.fromkeys(missing, ()), {}, folder)


def _fill(model: PeftModel, adapter_name: str, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy the tensors into the adapter's layers; PEFT itself says which ones they need."""
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    check_shapes(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: tensor.shape for name, tensor in tensors.items()},
        folder,
    )
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
