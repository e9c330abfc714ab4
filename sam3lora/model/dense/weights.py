"""Dense folders as plain tensors, for an engine that holds several adapters over one base.

A dense folder is LoRA or bottlenecks of the vision trunk, or none where the head was trained alone, with a head beside
it. `any_adapter.AdapterReader` reads folders of every task.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import FolderSignature, refuse_other_base
from sam3lora.model.adapter.folder_files import CONFIG_FILE, HEAD_FILE, METADATA_FILE
from sam3lora.model.adapter.metadata import AdapterMetadata, is_printable
from sam3lora.model.adapter.peft_files import FLOATING, read_tensors
from sam3lora.model.adapter.weights import (
    AdapterSummary,
    AdapterWeights,
    digest,
    read_lora,
    summarise_lora,
)
from sam3lora.model.dense.bottleneck import Bottleneck
from sam3lora.model.dense.folder import read_dense_metadata, refuse_other_resolution
from sam3lora.model.dense.head import DenseHead
from sam3lora.model.dense.settings import DenseSettings
from sam3lora.model.loading import LoadedBase
from sam3lora.model.staged.trunk import TRUNK

MAX_CLASS_CHARS = 200  # of a name: listings show all of them
_TYPES = FLOATING | {"I64": 8}  # batch norm counts its batches


@dataclass(frozen=True)
class DenseWeights(AdapterWeights):
    """The LoRA of a dense folder, without modules where there is none, and its head.

    `head` and `bottlenecks`, one for each layer of the trunk or None, are on the CPU, in evaluation mode and without
    gradients; `size_bytes` and `version` include them.
    """

    settings: DenseSettings
    head: DenseHead
    bottlenecks: nn.ModuleList | None


def summarise_dense(folder: Path, base: LoadedBase, *, max_rank: int | None = None) -> AdapterSummary:
    """What is known of a dense folder without its weights.

    Raises:
        NotLowRankError: The configuration asks for more than LoRA or DoRA.
        UserError: That shows already that `read_dense` would refuse it.
        OSError: A file cannot be read.
    """
    metadata = read_dense_metadata(folder)
    settings = _settings(metadata, folder)
    _check_settings(settings, base, folder)
    refuse_other_resolution(base, metadata, folder)
    refuse_other_base(base.model, metadata, folder, fingerprint_of=lambda _: base.fingerprint)
    head_bytes = (folder / HEAD_FILE).stat().st_size
    if not metadata.lora and not (folder / CONFIG_FILE).is_file():
        return AdapterSummary(None, metadata, None, head_bytes, _components(settings))
    lora = summarise_lora(folder, metadata, max_rank=max_rank)
    return replace(lora, size_bytes=lora.size_bytes + head_bytes)


def _settings(metadata: AdapterMetadata, folder: Path) -> DenseSettings:
    try:
        return DenseSettings(**(metadata.dense or {}))
    except UserError as error:
        raise UserError(f"{folder / METADATA_FILE}: dense: {str(error)[:300]}") from None


def _check_settings(settings: DenseSettings, base: LoadedBase, folder: Path) -> None:
    num_layers = len(base.model.vision_encoder.backbone.layers)
    layers = list(settings.layers)
    if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
        raise UserError(
            f"{folder} reads layers {layers} of the vision trunk: expected ascending numbers from 0 to {num_layers - 1}"
        )
    are_short = all(is_printable(name) and len(name) <= MAX_CLASS_CHARS for name in settings.classes)
    if not are_short or len(set(settings.classes)) < len(settings.classes):
        raise UserError(
            f"{folder}: expected names of classes that differ and can be shown, of at most {MAX_CLASS_CHARS} characters"
        )


def read_dense(folder: Path, signature: FolderSignature, base: LoadedBase, known: AdapterSummary) -> DenseWeights:
    """Read the weights of a dense folder, in the version of this signature, whose summary is known.

    Raises:
        NotLowRankError, UserError: As `AdapterReader.read`.
    """
    metadata = known.metadata
    assert metadata is not None
    settings = _settings(metadata, folder)
    parts, contents = _read_parts(folder, settings, base)
    if known.config is None:
        version = digest(folder, contents)
        lora = AdapterWeights({}, metadata, 0, 0, version, signature, _components(settings))
    else:
        lora = read_lora(folder, signature, base.model, known)
        if elsewhere := [name for name in lora.modules if not name.startswith(TRUNK)]:
            raise UserError(f"{folder} is of task dense and adapts {elsewhere[0]}: expected the vision trunk alone")
        # The digest of the LoRA is of fixed length: no two folders give the same bytes.
        version = digest(folder, lora.version.encode() + contents)
    values = {field.name: getattr(lora, field.name) for field in fields(lora)}
    values |= {
        "version": version,
        "size_bytes": lora.size_bytes + sum(one.nbytes for one in parts.state_dict().values()),
    }
    return DenseWeights(**values, settings=settings, head=parts["head"], bottlenecks=_bottlenecks(parts))


def _components(settings: DenseSettings) -> frozenset[str]:
    """The parts of the model that an adapter without LoRA changes."""
    return frozenset() if settings.bottleneck_width is None else frozenset({"vision_encoder"})


def _read_parts(folder: Path, settings: DenseSettings, base: LoadedBase) -> tuple[Any, bytes]:
    """The head and the bottlenecks in float32, under the names that they have in their file, and its contents."""
    trunk: Any = base.model.vision_encoder.backbone
    channels = trunk.config.hidden_size
    with torch.device("meta"):  # nothing is allocated before the file was found to fit
        parts = nn.ModuleDict()
        parts["head"] = DenseHead(
            channels,
            len(settings.classes),
            width=settings.width,
            num_layers=len(settings.layers),
            norm=settings.norm,
        )
        if settings.bottleneck_width is not None:
            layers = [{"bottleneck": Bottleneck(channels, settings.bottleneck_width)} for _ in trunk.layers]
            parts["trunk"] = nn.ModuleDict({"layers": nn.ModuleList(map(nn.ModuleDict, layers))})
    expected = {name: tuple(tensor.shape) for name, tensor in parts.state_dict().items()}
    found, contents = read_tensors(folder, expected, name=HEAD_FILE, settings=METADATA_FILE, types=_TYPES)
    weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    parts.load_state_dict(weights, assign=True)
    return parts.eval().requires_grad_(False), contents


def _bottlenecks(parts: Any) -> nn.ModuleList | None:
    return nn.ModuleList(layer["bottleneck"] for layer in parts["trunk"]["layers"]) if "trunk" in parts else None
