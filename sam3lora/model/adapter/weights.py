"""The weights of a LoRA adapter as plain tensors for each base module, read from its folder.

``load_adapter`` changes the model, which must not run meanwhile. Here the model is only looked at: any thread may read
an adapter while the model runs. The weights are made for an :class:`~sam3lora.model.adapter.bank.AdapterBank`.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import FolderSignature, read_unchanged, refuse_other_base
from sam3lora.model.adapter.folder_files import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE, read_small
from sam3lora.model.adapter.metadata import DETECTION, AdapterMetadata, read_metadata, refuse_other_tasks
from sam3lora.model.adapter.peft_config import read_config
from sam3lora.model.adapter.peft_files import (
    TENSOR_PREFIX,
    check_finite,
    lora_shapes,
    read_header,
    read_tensors,
    tensor_name,
)
from sam3lora.model.adapter.target_modules import ValuesByName, adapted_names, base_modules
from sam3lora.model.components import component_of, unwrap
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.staged.trunk import TRUNK

# What PEFT can do beyond LoRA and DoRA: each needs more than a low-rank product beside the base layer.
_UNSUPPORTED = ("modules_to_save", "lora_bias", "target_parameters", "use_qalora")
_MERGE_HINT = "it cannot share a batch with other adapters: merge it into its base with `sam3lora export --merge`"


class NotLowRankError(UserError):
    """The adapter does more than LoRA or DoRA on Linear and Conv2d modules, so the bank cannot hold it."""


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA or DoRA update of one Linear or Conv2d module, its scaling and magnitude included.

    The output is ``base(x) + (gain - 1) * (base(x) - bias) + up(down(x))``.

    Attributes:
        down: (rank, in) for a Linear, (rank, in, kh, kw) for a Conv2d.
        up: (out, rank), also for a Conv2d, where it is a 1x1 convolution.
        gain: (out,), DoRA's magnitude over the norm of the updated weight; None for plain LoRA.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.down, self.up, self.gain) if tensor is not None)


@dataclass(frozen=True)
class AdapterWeights:
    """All updates of one adapter, on the CPU in float32 (float64 for a float64 base), checked against the base.

    ``modules`` has the names of the base model; ``rank`` is the largest. ``version`` is a digest of the folder's files
    and changes whenever the adapter does; ``signature``, from `folder_signature`, tells sooner of a change.
    """

    modules: dict[str, LoraWeights]
    metadata: AdapterMetadata | None
    rank: int
    size_bytes: int
    version: str
    signature: FolderSignature
    components: frozenset[str]

    @cached_property
    def trunk_digest(self) -> str | None:
        """SHA-256 of what the adapter changes in the vision trunk; None if that is nothing."""
        changed = {name: one for name, one in self.modules.items() if name.startswith(TRUNK)}
        if not changed:
            return None
        found = hashlib.sha256()
        for name, one in sorted(changed.items()):
            for tensor in (one.down, one.up, one.gain):
                if tensor is not None:
                    found.update(f"{name} {tuple(tensor.shape)};".encode())
                    found.update(tensor.to(torch.float32).contiguous().numpy().astype("<f4").tobytes())
        return found.hexdigest()

    @property
    def task(self) -> str:
        return DETECTION if self.metadata is None else self.metadata.task

    @property
    def geometry_cls(self) -> bool:
        """Whether the adapter was trained with the geometry CLS token; a plain PEFT adapter counts as yes."""
        return True if self.metadata is None else self.metadata.geometry_cls


@dataclass(frozen=True)
class _Target:
    """A module that the configuration adapts, with its rank and scaling."""

    module: nn.Linear | nn.Conv2d
    rank: int
    scaling: float


def read_adapter_weights(
    folder: str | Path, model: nn.Module, *, check_base: bool = True, max_rank: int | None = None
) -> AdapterWeights:
    """Read an adapter folder for ``model``, a base without PEFT layers; any thread may call it at any time.

    The weights of the model must not change: its fingerprint is computed once. ``check_base`` refuses another base than
    the adapter was trained on, ``max_rank`` larger ranks before anything of their size is read.

    Raises:
        NotLowRankError: The adapter does more than LoRA or DoRA on Linear and Conv2d modules.
        UserError: The folder is incomplete, damaged or for another base, or changed each time it was read.
    """
    folder = Path(folder)

    def read(signature: FolderSignature) -> AdapterWeights:
        known = read_summary(folder, model if check_base else None, max_rank=max_rank)
        return read_lora(folder, signature, model, known)

    return read_unchanged(folder, read)


@dataclass(frozen=True)
class AdapterSummary:
    """What is known of an adapter without its weights.

    `rank` is the largest that the configuration names; `size_bytes` is that of the weights, and `components` are the
    parts of the model that its tensors belong to. A dense head alone has no `config` and no `rank`.
    """

    config: LoraConfig | None
    metadata: AdapterMetadata | None
    rank: int | None
    size_bytes: int
    components: frozenset[str]


def read_summary(folder: str | Path, model: nn.Module | None = None, *, max_rank: int | None = None) -> AdapterSummary:
    """Read what can be read quickly of an adapter folder, and refuse it for what that shows; from any thread.

    With a `model`, the base is compared with the one that the adapter was trained on.

    Raises:
        NotLowRankError: The configuration asks for more than LoRA or DoRA.
        UserError: A file is missing or damaged, the base is another one, or the rank is above `max_rank`.
        OSError: A file cannot be read.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    refuse_other_tasks(metadata, folder)
    found = summarise_lora(folder, metadata, max_rank=max_rank)
    if model is not None and metadata is not None:
        refuse_other_base(model, metadata, folder, fingerprint_of=fingerprint_once)
    return found


def summarise_lora(folder: Path, metadata: AdapterMetadata | None, *, max_rank: int | None) -> AdapterSummary:
    """`read_summary` of PEFT's two files alone."""
    config = read_config(folder)
    _check_supported(config, folder)
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if max_rank is not None and rank > max_rank:
        raise UserError(
            f"{folder} has rank {rank}, but at most {max_rank} is accepted here: raise the limit or merge it"
        )
    roots = {name.removeprefix(TENSOR_PREFIX).partition(".")[0] for name in read_header(folder)}
    components = {component for root in roots if (component := component_of(root)) is not None}
    return AdapterSummary(config, metadata, rank, (folder / WEIGHTS_FILE).stat().st_size, frozenset(components))


def read_lora(folder: Path, signature: FolderSignature, model: nn.Module, known: AdapterSummary) -> AdapterWeights:
    """Read the weights of PEFT's two files, in the version of this signature, whose summary is known.

    Raises:
        NotLowRankError, UserError: As `read_adapter_weights`.
    """
    assert known.config is not None
    targets = _find_targets(known.config, unwrap(model), folder)
    expected: dict[str, tuple[int, ...]] = {}
    for name, target in targets.items():
        expected |= lora_shapes(name, target.module, target.rank, known.config.use_dora)
    tensors, contents = read_tensors(folder, expected)
    modules = {name: _fold(name, target, tensors, folder) for name, target in targets.items()}
    return AdapterWeights(
        modules=modules,
        metadata=known.metadata,
        rank=max(target.rank for target in targets.values()),
        size_bytes=sum(weights.size_bytes for weights in modules.values()),
        version=digest(folder, contents),
        signature=signature,
        components=frozenset(component for name in modules if (component := component_of(name)) is not None),
    )


# ---- configuration and base ---------------------------------------------------------------------------------------

_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def fingerprint_once(model: nn.Module) -> str:
    """The fingerprint of a model whose weights do not change."""
    base = unwrap(model)
    if base not in _FINGERPRINTS:
        _FINGERPRINTS[base] = fingerprint(base)
    return _FINGERPRINTS[base]


def _check_supported(config: LoraConfig, folder: Path) -> None:
    variants = [field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    for field in (*_UNSUPPORTED, *variants):
        if field != "use_dora" and getattr(config, field, None):
            raise NotLowRankError(f"{folder}: {CONFIG_FILE} sets {field}; {_MERGE_HINT}")


def _find_targets(config: LoraConfig, base: nn.Module, folder: Path) -> dict[str, _Target]:
    """The modules that PEFT would adapt, in model order."""
    if not config.target_modules:
        raise UserError(f"{folder}: {CONFIG_FILE} names no target_modules")
    modules = base_modules(base)
    ranks, alphas = ValuesByName(config.rank_pattern or {}), ValuesByName(config.alpha_pattern or {})
    targets = {}
    for name in adapted_names(config, modules):
        module = _adaptable(modules[name], name, folder)
        rank, alpha = ranks.get(name, config.r), alphas.get(name, config.lora_alpha)
        targets[name] = _Target(module, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if not targets:
        raise UserError(f"{folder} does not fit {type(base).__name__}: its target_modules match no module of it")
    return targets


def _adaptable(module: nn.Module, name: str, folder: Path) -> nn.Linear | nn.Conv2d:
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise NotLowRankError(
            f"{folder} adapts {name}, a {type(module).__name__} and no Linear or Conv2d; {_MERGE_HINT}"
        )
    if isinstance(module, nn.Conv2d) and (
        module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros"
    ):  # PEFT's own layers leave the last two out
        raise NotLowRankError(
            f"{folder} adapts {name}, a grouped, dilated or specially padded convolution; {_MERGE_HINT}"
        )
    return module


# ---- tensors ------------------------------------------------------------------------------------------------------


def digest(folder: Path, weights: bytes) -> str:
    """SHA-256 over the folder's configuration, metadata and weights."""
    found = hashlib.sha256()
    for name in (CONFIG_FILE, METADATA_FILE):
        content = read_small(folder / name) if (folder / name).is_file() else b""
        found.update(hashlib.sha256(content).digest())
    found.update(weights)
    return found.hexdigest()


def _fold(name: str, target: _Target, tensors: dict[str, Tensor], folder: Path) -> LoraWeights:
    """Fold the scaling into ``up``, and for DoRA (https://arxiv.org/abs/2402.09353) the magnitude into both factors."""
    base_weight = target.module.weight.detach()
    dtype = torch.promote_types(base_weight.dtype, torch.float32)
    down = tensors[tensor_name(name, "lora_A.weight")].to(dtype)
    up = tensors[tensor_name(name, "lora_B.weight")].to(dtype).flatten(1) * target.scaling
    gain = None
    magnitude = tensors.get(tensor_name(name, "lora_magnitude_vector"))
    if magnitude is not None:
        updated = base_weight.flatten(1).to("cpu", dtype) + up @ down.flatten(1)
        gain = magnitude.to(dtype).flatten() / torch.linalg.vector_norm(updated, dim=1)
        up = gain[:, None] * up
        check_finite({f"the DoRA magnitude of {name}": gain}, str(folder), UserError)
    check_finite({f"{name}, scaled by {target.scaling:g},": up}, str(folder), UserError)
    return LoraWeights(down, up, gain)
