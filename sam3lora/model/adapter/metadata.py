"""Adapter metadata: the contents of ``sam3lora.json`` in an adapter folder."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.files import write_whole
from sam3lora.model.adapter.folder_files import METADATA_FILE, read_json_object, shown

FORMAT_VERSION = 1
DENSE_FORMAT_VERSION = 2  # so that a version without dense prediction refuses the folder
CLICKS_FORMAT_VERSION = 3
DETECTION, DENSE, CLICKS = "detection", "dense", "clicks"
MAX_TEXT_CHARS = 4096
MAX_PROMPT_THRESHOLDS = 5_000
MAX_THRESHOLD_CHARS = 200_000  # of their prompts together: listings show them


def current_versions() -> dict[str, str]:
    """Installed versions of the packages that decide what an adapter computes."""
    found = {}
    for package in ("sam3lora", "torch", "transformers", "peft"):
        try:
            found[package] = distributions.version(package)
        except distributions.PackageNotFoundError:
            continue
    return found


@dataclass
class AdapterMetadata:
    """Everything that is needed to use an adapter the way it was trained.

    ``resolution`` is the side of the model input in pixels. With ``geometry_cls`` the geometry CLS token follows the
    text tokens. ``post_processing`` holds the defaults wherever the adapter is used. ``data`` and ``metrics`` are
    summaries; ``versions`` are those of the packages that wrote it. ``dense`` holds the `DenseSettings` of a folder
    whose ``task`` is dense, ``clicks`` the `ClickOrigin` of one whose ``task`` is clicks.
    """

    base_model: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    prompts: list[str] = field(default_factory=list)
    resolution: int | None = None
    geometry_cls: bool = True
    post_processing: PostProcessing | None = None
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=current_versions)
    format_version: int = FORMAT_VERSION
    task: str = DETECTION
    dense: dict[str, Any] | None = None
    clicks: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        post = self.post_processing
        values = asdict(self) | {"post_processing": None if post is None else post.model_dump(mode="json")}
        if self.task == DETECTION:
            del values["task"]
        for task in (DENSE, CLICKS):
            if self.task != task:
                del values[task]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterMetadata:
        """Keys of newer versions are ignored, but not those of post-processing, which change what is found.

        Raises:
            UserError: The format is newer than this version can read, or a value is invalid.
        """
        found = values.get("format_version", FORMAT_VERSION)
        if not isinstance(found, int) or found > CLICKS_FORMAT_VERSION:
            raise UserError(
                f"{METADATA_FILE} has format {shown(found)}; this sam3lora reads up to {CLICKS_FORMAT_VERSION}: "
                "install a newer one"
            )
        known = {item.name for item in fields(cls)}
        metadata = cls(**{name: value for name, value in values.items() if name in known})
        expected: dict[str, tuple[type, ...]] = dict.fromkeys(("data", "metrics", "lora", "versions"), (dict,))
        expected |= dict.fromkeys(("base_model", "base_revision", "base_fingerprint"), (str, type(None)))
        expected |= {"prompts": (list,), "resolution": (int, type(None)), "geometry_cls": (bool,)}
        expected |= {"task": (str,), "dense": (dict, type(None)), "clicks": (dict, type(None))}
        for name, types in expected.items():
            value = getattr(metadata, name)
            if not isinstance(value, types):
                raise UserError(f"{METADATA_FILE}: {name} must be {types[0].__name__}, got {shown(value)}")
        for text in (metadata.base_model, metadata.base_revision, metadata.base_fingerprint, *metadata.prompts):
            if text is not None and not is_printable(text):
                raise UserError(
                    f"{METADATA_FILE}: expected texts of characters that can be shown, at most {MAX_TEXT_CHARS}, got "
                    f"{shown(text)}"
                )
        described = {name for name in (DENSE, CLICKS) if getattr(metadata, name) is not None}
        if metadata.task not in (DETECTION, DENSE, CLICKS) or described != {metadata.task} - {DETECTION}:
            raise UserError(
                f"{METADATA_FILE}: expected task {DETECTION}, or {DENSE} or {CLICKS} and its settings, got "
                f"{shown(metadata.task)}"
            )
        return replace(metadata, post_processing=_read_post_processing(values))


def _read_post_processing(values: dict[str, Any]) -> PostProcessing | None:
    """The recorded post-processing; the ``thresholds`` of earlier versions count as mask suppression."""
    key = "post_processing" if values.get("post_processing") is not None else "thresholds"
    recorded = values.get(key)
    if recorded is None or recorded == {}:
        return None
    if not isinstance(recorded, dict):
        raise UserError(f"{METADATA_FILE}: {key} must be dict, got {shown(recorded)}")
    if key == "thresholds":
        renamed = {"threshold" if name == "detection_threshold" else name: value for name, value in recorded.items()}
        recorded = {"nms": "mask"} | {name: renamed[name] for name in PostProcessing.model_fields if name in renamed}
    try:
        post = PostProcessing(**recorded)
    except UserError as error:
        raise UserError(f"{METADATA_FILE}: {key}: {str(error)[:300]}") from None
    check_prompt_thresholds(post)
    return post


def check_prompt_thresholds(post: PostProcessing) -> None:
    """Raise a UserError for thresholds that an adapter cannot record."""
    prompts = post.prompt_thresholds
    num_chars = sum(map(len, prompts))
    is_small = len(prompts) <= MAX_PROMPT_THRESHOLDS and num_chars <= MAX_THRESHOLD_CHARS
    if not is_small or not all(map(is_printable, prompts)):
        raise UserError(
            f"{METADATA_FILE}: prompt_thresholds must have at most {MAX_PROMPT_THRESHOLDS} prompts of together "
            f"{MAX_THRESHOLD_CHARS} characters that can be shown, got {len(prompts)} of {num_chars}: record one "
            "threshold for all prompts"
        )


def is_printable(text: object) -> bool:
    """Whether it is a short text that can be written as UTF-8, without control characters."""
    if not isinstance(text, str) or len(text) > MAX_TEXT_CHARS:
        return False
    return text.isprintable() or not any(unicodedata.category(char) in ("Cc", "Cs") for char in text)


def write_metadata(folder: Path, values: dict[str, Any]) -> None:
    """Write ``sam3lora.json``, from :meth:`AdapterMetadata.to_dict` or with further keys."""
    write_whole(folder / METADATA_FILE, json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")


def read_metadata(folder: str | Path) -> AdapterMetadata | None:
    """Metadata of an adapter folder; None for a plain PEFT adapter, which has none.

    Raises:
        UserError: The file is damaged.
    """
    values = read_metadata_values(folder)
    try:
        return None if values is None else AdapterMetadata.from_dict(values)
    except UserError as error:
        raise UserError(f"{Path(folder)}: {error}") from None


def is_dense_folder(folder: str | Path) -> bool:
    """Whether the metadata of a folder say that it labels pixels.

    Raises:
        UserError: They are damaged.
    """
    metadata = read_metadata(folder)
    return metadata is not None and metadata.task == DENSE


def refuse_other_tasks(metadata: AdapterMetadata | None, folder: Path) -> None:
    """Raise a UserError for a folder that finds no objects of prompts, where one that does is needed."""
    if metadata is None or metadata.task == DETECTION:
        return
    raise UserError(f"{folder} is of task {metadata.task}: it {_USE[metadata.task]}")


_USE = {
    DENSE: "labels each pixel and finds no objects of prompts. Use `sam3lora infer` without --prompt, "
    "Predictor.predict_dense, or `sam3lora validate` to measure it",
    CLICKS: "answers clicks on objects and finds none by prompts. Use `sam3lora infer --click`, the click_adapter of "
    "Predictor and of POST /v1/refine, or `sam3lora validate --clicks` to measure it",
}


def read_metadata_values(folder: str | Path) -> dict[str, Any] | None:
    """All values of ``sam3lora.json``, unchecked; None where there is no such file.

    Raises:
        UserError: The file holds no JSON object, or one that is too large.
    """
    file = Path(folder) / METADATA_FILE
    return read_json_object(file) if file.is_file() else None


def recorded_post_processing(metadata: AdapterMetadata | None) -> PostProcessing:
    """The settings that an adapter records; the defaults for the base (None) and for an adapter without any."""
    return (metadata and metadata.post_processing) or PostProcessing()
