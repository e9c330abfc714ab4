"""Adapter folders: written whole or not at all, read only when complete and made for this base model.

A folder holds plain PEFT files (``adapter_config.json``, ``adapter_model.safetensors``), which load with
``PeftModel.from_pretrained`` and no code of ours, ``sam3lora.json`` and a model card. Pickles are never read.
"""

from __future__ import annotations

import copy
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.files import replace_folder, sync_files, write_whole
from sam3lora.model.adapter.metadata import (
    METADATA_FILE,
    AdapterMetadata,
    read_metadata,
    read_metadata_values,
    write_metadata,
)
from sam3lora.model.components import unwrap
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.publish.model_card import CARD_FILE, render_model_card, update_post_processing

__all__ = ["AdapterMetadata", "is_adapter_folder", "list_adapters", "load_adapter", "read_metadata", "save_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ATTEMPTS_TO_READ = 3

T = TypeVar("T")
FolderSignature = tuple[tuple[int, ...] | None, ...]
"""Equal as long as no file of an adapter folder is replaced or written to."""


def save_adapter(
    model: PeftModel, folder: str | Path, metadata: AdapterMetadata | None = None, *, adapter_name: str = "default"
) -> Path:
    """Write an adapter to ``folder``, replacing an adapter that is there already.

    The files are written beside it and moved into place at the end: whoever opens ``folder``, at any moment and after
    any crash, finds a complete adapter or none. Without ``metadata`` (a model that is no SAM 3) only the PEFT files
    are written.

    Raises:
        UserError: ``folder`` exists and is no adapter folder, so replacing it could destroy something.
        ValueError: the model has no such adapter, or its weights are not finite.
    """
    if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
        raise ValueError(f"expected a PEFT model with an adapter {adapter_name!r}, got {type(model).__name__}")
    folder = Path(folder)
    if folder.exists() and not (is_adapter_folder(folder) or (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder} exists and is no adapter folder: choose another place or remove it")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    check_finite(tensors, "the adapter in memory", ValueError)

    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    config.base_model_name_or_path = (metadata.base_model if metadata else None) or config.base_model_name_or_path
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    scratch.mkdir()
    try:
        save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(scratch))
        # safetensors writes for the owner alone; whoever may read the other files may serve the adapter.
        shutil.copymode(scratch / CONFIG_FILE, scratch / WEIGHTS_FILE)
        if metadata is not None:
            write_metadata(scratch, metadata.to_dict())
            (scratch / CARD_FILE).write_text(render_model_card(metadata), encoding="utf-8")
        sync_files(scratch)
        replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    check_base: bool = True,
    adapter_name: str = "default",
    trainable: bool = False,
) -> tuple[PeftModel, AdapterMetadata | None]:
    """Put an adapter on a base model, or one more on a PEFT model; the base model is changed in place.

    Args:
        check_base: refuse a base whose fingerprint differs from the one the adapter was trained on.
        adapter_name: name for it in the PEFT model; it becomes the active one if it is the first.
        trainable: leave its parameters trainable.

    Returns:
        The PEFT model, and the metadata (None for a plain PEFT adapter without ``sam3lora.json``).

    Raises:
        UserError: the folder is incomplete or damaged, the base is another one, or tensors are missing or left over.
            The model is then as it was before.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read_tensors(folder)
    metadata = read_metadata(folder)
    if check_base and metadata is not None:
        refuse_other_base(model, metadata, folder)

    config.inference_mode = not trainable
    shared = model if isinstance(model, PeftModel) else None
    if shared is not None and adapter_name in shared.peft_config:
        raise ValueError(f"the model already has an adapter {adapter_name!r}: delete it first or use another name")
    try:
        if shared is not None:
            peft_model = shared
            peft_model.add_adapter(adapter_name, config)
        else:
            config.base_model_name_or_path = getattr(unwrap(model), "name_or_path", None) or None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks by the old name
                peft_model = cast(PeftModel, get_peft_model(model, config, adapter_name=adapter_name))  # type: ignore
    except ValueError as error:
        raise UserError(f"{folder} does not fit {type(unwrap(model)).__name__}: {error}") from error
    try:
        _fill(peft_model, adapter_name, tensors, folder)
    except UserError:
        if shared is not None:
            peft_model.delete_adapter(adapter_name)
        else:
            peft_model.unload()
        raise
    return peft_model.eval() if not trainable else peft_model, metadata


def record_post_processing(folder: str | Path, post: PostProcessing) -> None:
    """Write post-processing settings into the metadata and the model card of an adapter folder.

    They are then the defaults wherever the adapter is used. All other values and the text of the card stay.

    Raises:
        UserError: The folder holds no complete adapter, or its metadata are damaged.
    """
    folder = Path(folder)
    if not is_adapter_folder(folder):
        raise UserError(f"{folder} is no adapter folder: expected {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    metadata = replace(read_metadata(folder) or AdapterMetadata(versions={}), post_processing=post)
    # From the file itself: it may have keys of a newer version. The old name of the settings goes.
    values = (read_metadata_values(folder) or {}) | metadata.to_dict()
    values.pop("thresholds", None)
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else render_model_card(metadata)
    write_metadata(folder, values)
    write_whole(card, update_post_processing(text, post))


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether the folder has the files of a complete adapter; they are not opened."""
    return all((Path(folder) / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE))


def check_adapter_folder(folder: str | Path) -> None:
    """Read everything in an adapter folder without a model.

    Raises:
        UserError: a file is missing, damaged or not of this kind, or weights are not finite.
    """
    read_config(Path(folder))
    _read_tensors(Path(folder))
    read_metadata(folder)


def folder_signature(folder: str | Path) -> FolderSignature:
    """Device, inode, size and times of each file of an adapter; None for a missing file. Files are not opened."""
    found: list[tuple[int, ...] | None] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE):
        try:
            file = (Path(folder) / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns))
    return tuple(found)


def read_unchanged(folder: Path, read: Callable[[FolderSignature], T]) -> T:
    """The result of `read`, all of it from one version of an adapter folder that others may replace meanwhile.

    Args:
        folder: Adapter folder.
        read: Reads the folder. Gets the signature of the version that it reads.

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
    """Name -> folder of the complete adapters directly under ``root``, sorted by name; hidden folders are skipped."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"adapter directory {root} does not exist")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name: path for path in folders if is_adapter_folder(path)}


def read_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of an adapter folder.

    Raises:
        UserError: a file is missing, or the configuration is none of LoRA or would change the base model itself.
    """
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        note = f"; {', '.join(pickles)} is a pickle and is never loaded, save it as safetensors" if pickles else ""
        reason = f"lacks {', '.join(missing)}{note}" if folder.is_dir() else "does not exist"
        raise UserError(f"adapter folder {folder} {reason}. Expected a folder written by `sam3lora train` or by PEFT")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises several kinds for unknown types and fields
        raise UserError(f"{folder / CONFIG_FILE} is no valid PEFT configuration: {error}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder} holds a {config.peft_type} adapter: expected LoRA")
    # These change the base model's own weights or structure, or name code to import.
    if config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{folder}: init_lora_weights={config.init_lora_weights!r} changes the base weights at loading; convert it "
            "to plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.bias != "none":
        raise UserError(
            f"{folder}: {CONFIG_FILE} sets bias={config.bias!r}, which changes the base's own biases and cannot be "
            'switched off: train the adapter with bias="none"'
        )
    for field in ("megatron_config", "layer_replication", "trainable_token_indices"):
        if getattr(config, field, None):
            raise UserError(f"{folder}: {CONFIG_FILE} sets {field}, which is not supported: remove it")
    config.init_lora_weights = True  # values come from the file; other initialisations need data
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, framework="pt") as header:
            if not list(header.keys()):
                raise UserError(f"{file} holds no tensors")
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {error}") from error
    check_finite(tensors, str(file), UserError)
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], where: str, error: type[ValueError]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise error(f"{where}: {name} has NaN or infinite values, the training that made it diverged")


def refuse_other_base(
    model: nn.Module,
    metadata: AdapterMetadata,
    folder: Path,
    *,
    fingerprint_of: Callable[[nn.Module], str] = fingerprint,
) -> None:
    """Raise UserError unless ``model`` is the base that the adapter says it was trained on, if it does."""
    expected = metadata.base_fingerprint
    if expected is None or (found := fingerprint_of(model)) == expected:
        return
    revision = f" at revision {metadata.base_revision}" if metadata.base_revision else ""
    name = getattr(unwrap(model), "name_or_path", None) or type(unwrap(model)).__name__
    raise UserError(
        f"adapter {folder} was trained on the base {metadata.base_model!r}{revision} (fingerprint {expected[:12]}), "
        f"but this model is {name!r} (fingerprint {found[:12]}): use it with that base"
    )


def check_shapes(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Raise UserError unless the file's tensors (name -> shape) are those that its configuration and the base need."""
    problems = []
    for verb, names in (("lacks", expected.keys() - found.keys()), ("has unexpected", found.keys() - expected.keys())):
        if names:
            problems.append(f"{verb} {len(names)} tensors, first {min(names)}")
    for name in sorted(expected.keys() & found.keys()):
        if tuple(expected[name]) != tuple(found[name]):
            problems.append(f"has {name} of shape {tuple(found[name])}, the model needs {tuple(expected[name])}")
            break
    if problems:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} and this base model: it {'; it '.join(problems)}. "
            "Use the base model the adapter was trained on"
        )


def _fill(model: PeftModel, adapter_name: str, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    check_shapes(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: tensor.shape for name, tensor in tensors.items()},
        folder,
    )
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
