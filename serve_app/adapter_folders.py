"""Adapter folders on disk: from an id to a folder that may be served, and what a folder says about itself.

Everything here waits for the disk and belongs in a thread.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sam3lora.errors import UserError
from sam3lora.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, is_adapter_folder, read_metadata
from sam3lora.model.adapter_metadata import METADATA_FILE
from sam3lora.model.components import COMPONENTS, component_of
from serve_app.calls import AdapterInfo
from serve_app.errors import ServeError
from serve_app.refusals import refuse_as
from serve_app.settings import ADAPTER_ID_PATTERN, AdapterSettings

FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE)

Signature = tuple[Any, ...]
"""Equal for an adapter folder that has not changed."""


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that exists within the root, as it was when it was looked at."""

    id: str
    path: Path
    signature: Signature


class AdapterFolders:
    """The folders under one root that the settings allow."""

    def __init__(self, settings: AdapterSettings) -> None:
        self._root = settings.root
        self._allowed = None if settings.allowed is None else frozenset(settings.allowed)
        self._known: dict[str, tuple[Signature, AdapterInfo]] = {}
        self._lock = threading.Lock()

    def allows(self, adapter_id: str) -> bool:
        """Whether the settings let this id be served; says nothing about its folder."""
        return self._allowed is None or adapter_id in self._allowed

    def find(self, adapter_id: str) -> AdapterFolder:
        """The folder of an id.

        Raises:
            ServeError: The id breaks the pattern, nothing is there or allowed under it, or it leads out of the root.
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
            files = [_stat_within(root, os.path.join(path, name)) for name in FILES]
        except _OutsideError:
            raise ServeError(
                "invalid_adapter", f"adapter {adapter_id!r} is linked to a place outside the root"
            ) from None
        except OSError as error:
            raise ServeError("invalid_adapter", f"adapter {adapter_id!r} cannot be read: {error.strerror}") from None
        versions = [file and (file.st_mtime_ns, file.st_size, file.st_ino) for file in files]
        return AdapterFolder(adapter_id, self._root / adapter_id, (folder.st_dev, folder.st_ino, *versions))

    def describe_all(self) -> list[tuple[Signature, AdapterInfo]]:
        """All that may be served, sorted by id; broken ones carry their error. Unchanged folders are not read again."""
        found = [self._describe(folder) for folder in self._all()]
        with self._lock:
            self._known = {info.id: (signature, info) for signature, info in found}
        return found

    def _all(self) -> Iterator[AdapterFolder]:
        try:
            names = sorted(path.name for path in self._root.iterdir()) if self._root is not None else []
        except OSError:
            names = []
        for name in names:
            try:
                folder = self.find(name)
            except ServeError:
                continue
            if any((folder.path / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE)):
                yield folder

    def _describe(self, folder: AdapterFolder) -> tuple[Signature, AdapterInfo]:
        with self._lock:
            signature, info = self._known.get(folder.id, (None, None))
        if info is None or signature != folder.signature:
            try:
                with refuse_as("invalid_adapter", folder.path):
                    info = _read_info(folder)
            except ServeError as error:
                info = AdapterInfo(folder.id, error=error.message)
        return folder.signature, info


def _not_found(adapter_id: str) -> ServeError:
    return ServeError("adapter_not_found", f"there is no adapter {adapter_id!r}: GET /v1/adapters lists them")


class _OutsideError(Exception):
    """A link leads out of the root."""


def _stat_within(root: str, path: str) -> os.stat_result | None:
    """What a path leads to; None if that is nothing. `root` holds no links, and the path's parent is within it."""
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            if not os.path.realpath(path, strict=True).startswith(os.path.join(root, "")):
                raise _OutsideError
            found = os.stat(path)
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_info(folder: AdapterFolder) -> AdapterInfo:
    """From headers and JSON; weights are not read."""
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
    return AdapterInfo(
        id=folder.id,
        prompts=tuple(str(prompt) for prompt in metadata.prompts) if metadata else (),
        rank=_rank(config),
        size_bytes=size_bytes,
        adapts=tuple(name for name in COMPONENTS if name in components),
    )


def _rank(config: dict[str, Any]) -> int | None:
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=None)
