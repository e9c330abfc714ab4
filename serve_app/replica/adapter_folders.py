"""Adapter folders on disk: the folder of an id, and the description of a folder.

All functions wait for the disk: call them in a thread.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sam3lora.model.adapter.folder import FolderSignature, file_signature
from sam3lora.model.adapter.folder_files import FILES
from sam3lora.model.adapter.metadata import CLICKS, read_metadata, recorded_post_processing
from sam3lora.model.adapter.weights import AdapterSummary, read_summary
from sam3lora.model.clicks.origin import ClickOrigin
from sam3lora.model.components import COMPONENTS
from serve_app.http.errors import ServeError, no_click_head, refuse_as
from serve_app.http.schemas import AdapterResponse, Task
from serve_app.settings import ADAPTER_ID_PATTERN, ADAPTER_ID_RULE, AdapterSettings, Limits

logger = logging.getLogger(__name__)

MAX_LISTED_PROMPTS = 1000
MAX_LISTED_CHARS = 200  # of a prompt
_MAX_ERROR_CHARS = 600
_IS_ID = re.compile(ADAPTER_ID_PATTERN).fullmatch


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that exists within the root, and its signature at the time of the look-up."""

    id: str
    path: Path
    signature: FolderSignature


class Described(NamedTuple):
    """A folder of the listing: what its files say, the same as JSON, and the texts that a search looks into.

    `vision_adapter` is the digest of the vision trunk that a click adapter was trained on; None for the base's.
    """

    signature: FolderSignature
    info: AdapterResponse
    json: str
    searched: tuple[str, ...]
    vision_adapter: str | None = None

    def changed(self, **changes: object) -> Described:
        """With other fields of `info`."""
        info = self.info.model_copy(update=changes)
        return self._replace(info=info, json=info.model_dump_json())


class AdapterFolders:
    """The folders under one root that the settings allow.

    `summarise` reads a folder without its weights, and raises what loading it would raise. Without `answers_clicks`
    no click adapter is read, for which the click head would be loaded.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        summarise: Callable[[Path], AdapterSummary] = read_summary,
        most_detections: int = Limits().max_detections,
        *,
        answers_clicks: bool = True,
    ) -> None:
        self._root = settings.root
        self._allowed = None if settings.allowed is None else frozenset(settings.allowed)
        self._summarise = summarise
        self._most_detections = most_detections
        self._answers_clicks = answers_clicks
        self._known: dict[str, Described] = {}
        self._lock = threading.Lock()

    def allows(self, adapter_id: str) -> bool:
        """Whether the settings allow this id; its folder may be missing or broken."""
        return self._allowed is None or adapter_id in self._allowed

    def find(self, adapter_id: str) -> AdapterFolder:
        """The folder of an id.

        Raises:
            ServeError: The id breaks the pattern, the folder is missing or not allowed, or a link leaves the root.
        """
        if not _IS_ID(adapter_id):
            raise ServeError("invalid_adapter", f"{ADAPTER_ID_RULE}: GET /v1/adapters lists them")
        if self._root is None or not self.allows(adapter_id):
            raise _not_found(adapter_id)
        return self._look(os.path.realpath(self._root), self._root, adapter_id)

    def check_task(self, folder: Path) -> None:
        """Refuse a click adapter where no clicks are answered, by its metadata alone.

        Raises:
            ServeError: `no_click_head`.
            UserError: The metadata are damaged.
        """
        if not self._answers_clicks and (metadata := read_metadata(folder)) and metadata.task == CLICKS:
            raise no_click_head("adapter")

    def describe_all(self) -> list[Described]:
        """All adapters that may be served, by id, broken ones with their error. Only changed folders are read again."""
        if self._root is None:
            return []
        root = os.path.realpath(self._root)
        try:
            names = sorted(os.listdir(root))
        except OSError:
            return []
        found: dict[str, Described] = {}
        for name in names:
            if _IS_ID(name):
                described = self._describe(root, name) if self.allows(name) else None
            else:
                described = self._describe_misnamed(root, name)
            if described is not None:
                found.setdefault(described.info.id, described)
        with self._lock:
            self._known = found
        return sorted(found.values(), key=lambda described: described.info.id)

    def _look(self, real_root: str, root: Path, adapter_id: str) -> AdapterFolder:
        path = os.path.join(real_root, adapter_id)
        try:
            folder = _stat_within(real_root, path)
            if folder is None or not stat.S_ISDIR(folder.st_mode):
                raise _not_found(adapter_id)
            files = [_stat_within(real_root, f"{path}/{name}") for name in FILES]
        except _OutsideError:
            raise ServeError(
                "invalid_adapter",
                f"adapter {adapter_id!r} links to a place outside the root: copy the folder into the root",
            ) from None
        except OSError as error:
            raise ServeError("invalid_adapter", f"adapter {adapter_id!r} cannot be read: {error.strerror}") from None
        signature = tuple(file_signature(file) if file is not None else None for file in files)
        return AdapterFolder(adapter_id, root / adapter_id, signature)

    def _describe(self, real_root: str, adapter_id: str) -> Described | None:
        """None for what is no adapter or no longer exists."""
        assert self._root is not None
        signature: FolderSignature = ()
        task: Task | None = None
        try:
            folder = self._look(real_root, self._root, adapter_id)
            signature = folder.signature
            with self._lock:
                known = self._known.get(adapter_id)
            if known is not None and known.signature == signature:
                return known
            if not _has_files(folder.path):
                return None
            with refuse_as("invalid_adapter", folder.path):
                self.check_task(folder.path)
                summary = self._summarise(folder.path)
                trunk = None if (origin := _origin(summary)) is None else origin.vision_adapter
                return _described(signature, self._response(adapter_id, summary), trunk)
        except ServeError as error:
            if error.type == "adapter_not_found" or (not signature and not _has_files(self._root / adapter_id)):
                return None
            message, task = error.message, "clicks" if error.type == "no_click_head" else None
        except OSError as error:
            message = f"adapter {adapter_id!r} cannot be read: {error.strerror}"
        except Exception:  # a damaged file may raise anything, and must not hide the other adapters
            logger.exception("adapter %s cannot be described", adapter_id)
            message = f"adapter {adapter_id!r} cannot be read: the log of the service has the reason"
        return _described(signature, AdapterResponse(id=adapter_id, task=task, error=message[:_MAX_ERROR_CHARS]))

    def _describe_misnamed(self, real_root: str, name: str) -> Described | None:
        """An adapter whose folder's name is no id, so that nobody can ask it; names with a dot first are hidden."""
        if name.startswith(".") or self._allowed is not None or not _has_files(Path(real_root, name)):
            return None
        shown = "".join(char if char.isprintable() else "?" for char in name[:100]) + ("..." if len(name) > 100 else "")
        return _described(
            (), AdapterResponse(id=shown, error=f"its name is no id: rename the folder, {ADAPTER_ID_RULE}")
        )

    def _response(self, adapter_id: str, known: AdapterSummary) -> AdapterResponse:
        if known.metadata is not None and known.metadata.dense is not None:
            return AdapterResponse(
                id=adapter_id,
                task="dense",
                classes=list(known.metadata.dense["classes"]),
                rank=known.rank,
                size_bytes=known.size_bytes,
                adapts=[name for name in COMPONENTS if name in known.components],
            )
        if (origin := _origin(known)) is not None:
            return AdapterResponse(
                id=adapter_id,
                task="clicks",
                rank=known.rank,
                size_bytes=known.size_bytes,
                adapts=["click_head"],
                clicks_vision="base" if origin.vision_adapter is None else "adapter",
            )
        prompts = known.metadata.prompts if known.metadata else []
        post = recorded_post_processing(known.metadata)
        return AdapterResponse(
            id=adapter_id,
            task="detection",
            prompts=[prompt[:MAX_LISTED_CHARS] for prompt in prompts[:MAX_LISTED_PROMPTS]],
            rank=known.rank,
            size_bytes=known.size_bytes,
            adapts=[name for name in COMPONENTS if name in known.components],
            post_processing=post.changed(max_detections=min(post.max_detections, self._most_detections)),
        )


def _described(signature: FolderSignature, info: AdapterResponse, vision_adapter: str | None = None) -> Described:
    searched = tuple(text.casefold() for text in (info.id, *info.prompts, *info.classes))
    return Described(signature, info, info.model_dump_json(), searched, vision_adapter)


def _origin(known: AdapterSummary) -> ClickOrigin | None:
    """What a click adapter was trained on; None of another task."""
    clicks = None if known.metadata is None else known.metadata.clicks
    return None if clicks is None else ClickOrigin(**clicks)


def _has_files(folder: Path) -> bool:
    """Whether the folder, which may be a link, has a file of an adapter."""
    return any(os.path.isfile(f"{folder}/{file}") for file in FILES)


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
