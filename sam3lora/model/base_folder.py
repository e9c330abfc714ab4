"""Base folders: finding the files of a base model, built in, local or on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3lora.errors import UserError
from sam3lora.local_paths import refuse_bad_path
from sam3lora.model.tiny import TINY, TINY_FOLDER

if TYPE_CHECKING:
    from torch import Tensor

# Never *.pt, *.bin or *.pth: loading a pickle runs code.
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt")
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class BaseFolder:
    """Files of a base model; ``name`` as the user gave it, ``revision`` the hub's commit, None for a local folder.

    ``config`` is the detector's configuration, ``tracker_config`` that of the tracker, which ``sam3`` checkpoints lack.
    """

    path: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    tracker_config: dict[str, Any] | None = None


def find_base(name: str, *, revision: str | None = None, local_files_only: bool = False) -> BaseFolder:
    """Find a base model and check that its files are complete and can be read, without loading weights.

    ``name`` is ``"tiny"`` (built in), a folder, or a hub id such as ``facebook/sam3``. A hub model is downloaded once;
    ``local_files_only`` takes it from the local cache. ``revision`` is a branch, tag or commit on the hub.

    Raises:
        UserError: The model is not found, not accessible, not complete, damaged, or not a SAM 3 checkpoint.
    """
    refuse_bad_path(name, "the base model")
    commit = None
    if name == TINY:
        path = TINY_FOLDER
    elif Path(name).expanduser().is_dir():
        path = Path(name).expanduser()
    elif name.startswith((".", "/", "~")) or "\\" in name or name.count("/") != 1:  # a path, no name on the hub
        raise UserError(f"base model folder {name!r} does not exist: give an existing folder, a hub id, or 'tiny'")
    else:
        path = _download(name, revision, local_files_only)
        commit = path.name
    _check_files(path, name)
    return describe_base(path, name, commit)


def describe_base(path: Path, name: str, revision: str | None) -> BaseFolder:
    """A base model by its configuration alone, whatever else its folder holds.

    Raises:
        UserError: The configuration cannot be read, or is not that of a SAM 3 checkpoint.
    """
    tracker = _read_json(path / "config.json").get("tracker_config")
    return BaseFolder(path, name, revision, read_model_config(path, name), tracker)


def _download(name: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{name} at revision {revision}" if revision else name
    try:
        return Path(
            snapshot_download(
                name, revision=revision, local_files_only=local_files_only, allow_patterns=list(_HUB_PATTERNS)
            )
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: request access on https://huggingface.co/{name}, then run `hf auth login` or set "
            "HF_TOKEN. The built-in model needs no account: model.name=tiny"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r}: use a branch, tag or commit of its page") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} was not found on the hub, or this account may not see it: check the spelling, and for a private "
            "model run `hf auth login` or set HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"{at} is not in the local cache and the hub cannot be used (no network, HF_HUB_OFFLINE, or "
            "model.local_files_only): download it once where there is a network, or give the folder that holds it, "
            "or use the built-in model.name=tiny"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is no valid hub id (owner/model), no folder, and not 'tiny'") from error
    except (errors.HTTPError, OSError) as error:
        raise UserError(f"could not download {at}: {error}") from error


def _check_files(path: Path, name: str) -> None:
    shards = _shards(path)
    missing = [file for file in ("config.json", *sorted(shards)) if not (path / file).is_file()]
    if not any(all((path / file).is_file() for file in files) for files in _TOKENIZER_FILES):
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    if not missing:
        _check_weights(path, shards)
        return
    pickles = sorted(file.name for pattern in ("*.pt", "*.pth", "*.bin") for file in path.glob(pattern))
    note = f" ({', '.join(pickles)} there is a pickle and is never loaded)" if pickles else ""
    raise UserError(
        f"base model {name!r}: {path} lacks {', '.join(missing)}{note}. Expected a SAM 3 saved by transformers: "
        "config.json, model.safetensors and the tokenizer's files"
    )


def _shards(path: Path) -> set[str]:
    """Names of the files of weights."""
    index = path / "model.safetensors.index.json"
    return set(_read_json(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}


def read_tensors(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a base folder whose names begin with one of ``prefixes``.

    Raises:
        UserError: A file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for shard in sorted(_shards(path)):
        try:
            with safe_open(path / shard, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
                found |= {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weights {path / shard} could not be loaded: {error}") from error
    return found


def _check_weights(path: Path, shards: Iterable[str]) -> None:
    """Check that the length of each file is that of its header: a download that broke off is shorter."""
    from safetensors import SafetensorError, safe_open

    for shard in shards:
        try:
            with safe_open(path / shard, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weights {path / shard} could not be loaded: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def read_model_config(path: Path, name: str) -> dict[str, Any]:
    """The detector's configuration; in a video checkpoint it is part of the model's configuration."""
    config = _read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type == "sam3":
        return config
    if model_type == "sam3_video":
        return config.get("detector_config") or {}
    raise UserError(
        f"base model {name!r} has model_type {model_type!r}: expected a SAM 3 checkpoint (sam3 or sam3_video), "
        "such as facebook/sam3"
    )


def read_processor_settings(path: Path) -> dict[str, Any]:
    """The image processor's settings stored with a model; empty if there are none."""
    for file in (path / "processor_config.json", path / "preprocessor_config.json"):
        if file.is_file():
            settings = _read_json(file)
            return settings.get("image_processor", settings)
    return {}
