"""Adapter folders on disk: the folder of an id, and the description of a folder.

All functions wait for the disk: call them in a thread.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    FolderSignature,
    folder_signature,
    is_adapter_folder,
    read_metadata,
)
from sam3lora.model.adapter.metadata import METADATA_FILE, recorded_post_processing
from sam3lora.model.components import COMPONENTS, component_of
from serve_app.http.errors import ServeError, refuse_as
from serve_app.http.schemas import AdapterResponse
from serve_app.settings import ADAPTER_ID_PATTERN, AdapterSettings

FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE)


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that exists within the root, and its signature at the time of the look-up."""

    id: str
    path: Path
    signature: FolderSignature


class AdapterFolders:
    """The folders under one root that the settings allow."""

    def __init__(self, settings: AdapterSettings) -> None:
        self._root = settings.root
        self._allowed = None if settings.allowed is None else frozenset(settings.allowed)
        self._known: dict[str, tuple[FolderSignature, AdapterResponse]] = {}
        self._lock = threading.Lock()

    def allows(self, adapter_id: str) -> bool:
        """Whether the settings allow this id; its folder may be missing or broken."""
        return self._allowed is None or adapter_id in self._allowed

    def find(self, adapter_id: str) -> AdapterFolder:
        """The folder of an id.

        Raises:
            ServeError: The id breaks the pattern, the folder is missing or not allowed, or a link leaves the root.
        """
        if not re.fullmatch(ADAPTER_ID_PATTERN, adapter_id):
            raise ServeError(
                "invalid_adapter",
                "an adapter id has up to 100 letters, digits, dots, hyphens and underscores and begins with a letter "
                "or a digit: GET /v1/adapters lists them",
            )
        if self._root is None or not self.allows(adapter_id):
            raise _not_found(adapter_id)
        root = os.path.realpath(self._root)
        path = os.path.join(root, adapter_id)
        try:
            folder = _stat_within(root, path)
            if folder is None or not stat.S_ISDIR(folder.st_mode):
                raise _not_found(adapter_id)
            for name in FILES:
                _stat_within(root, os.path.join(path, name))
        except _OutsideError:
            raise ServeError(
                "invalid_adapter",
                f"adapter {adapter_id!r} links to a place outside the root: copy the folder into the root",
            ) from None
        except OSError as error:
            raise ServeError("invalid_adapter", f"adapter {adapter_id!r} cannot be read: {error.strerror}") from None
        return AdapterFolder(adapter_id, self._root / adapter_id, folder_signature(path))

    def describe_all(self) -> list[tuple[FolderSignature, AdapterResponse]]:
        """All adapters that may be served, by id, broken ones with their error. Only changed folders are read again."""
        described = (self._describe(adapter_id) for adapter_id in self._names())
        found = [one for one in described if one is not None]
        with self._lock:
            self._known = {info.id: (signature, info) for signature, info in found}
        return found

    def _names(self) -> list[str]:
        """Names of the folders, links included, that have a file of an adapter."""
        if self._root is None:
            return []
        try:
            names = sorted(os.listdir(self._root))
        except OSError:
            return []
        wanted = (CONFIG_FILE, WEIGHTS_FILE)
        return [
            name
            for name in names
            if re.fullmatch(ADAPTER_ID_PATTERN, name)
            and any(os.path.isfile(os.path.join(self._root, name, file)) for file in wanted)
        ]

    def _describe(self, adapter_id: str) -> tuple[FolderSignature, AdapterResponse] | None:
        """None for an adapter that may not be served or no longer exists."""
        signature: FolderSignature = ()
        try:
            folder = self.find(adapter_id)
            signature = folder.signature
            with self._lock:
                known = self._known.get(adapter_id)
            if known is not None and known[0] == signature:
                return known
            with refuse_as("invalid_adapter", folder.path):
                return signature, _describe_folder(folder)
        except ServeError as error:
            if error.type == "adapter_not_found":
                return None
            message = error.message
        except Exception as error:  # a damaged file may raise anything, and must not hide the other adapters
            message = f"{adapter_id} cannot be read: {type(error).__name__}"
        return signature, AdapterResponse(id=adapter_id, error=message)


def _not_found(adapter_id: str) -> ServeError:
    return ServeError("adapter_not_found", f"there is no adapter {adapter_id!r}: GET /v1/adapters lists them")


class _OutsideError(Exception):
    """A link leads out of the root."""


def _stat_within(root: str, path: str) -> os.stat_result | None:
    """The stat of the file or folder, links followed; None if there is none.

    `root` holds no links, and the path's parent is within it.
    """
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            if not os.path.realpath(path, strict=True).startswith(os.path.join(root, "")):
                raise _OutsideError
            found = os.stat(path)
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None


def _describe_folder(folder: AdapterFolder) -> AdapterResponse:
    """Reads headers and JSON only, no weights."""
    if not is_adapter_folder(folder.path):
        raise UserError(f"{folder.path} lacks {CONFIG_FILE} or {WEIGHTS_FILE}")
    try:
        config = json.loads((folder.path / CONFIG_FILE).read_text(encoding="utf-8"))
        metadata = read_metadata(folder.path)
        with safe_open(folder.path / WEIGHTS_FILE, framework="numpy") as header:
            components = {component_of(name) for name in header.keys()}  # noqa: SIM118 (not a dict)
        size_bytes = (folder.path / WEIGHTS_FILE).stat().st_size
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder.path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder.path / CONFIG_FILE} is no configuration of a LoRA adapter")
    return AdapterResponse(
        id=folder.id,
        prompts=[str(prompt) for prompt in metadata.prompts] if metadata else [],
        rank=_rank(config),
        size_bytes=size_bytes,
        adapts=[name for name in COMPONENTS if name in components],
        post_processing=recorded_post_processing(metadata),
    )


def _rank(config: dict[str, Any]) -> int | None:
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=None)
