"""Adapter metadata: the contents of ``sam3lora.json`` in an adapter folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.files import write_whole

METADATA_FILE = "sam3lora.json"
FORMAT_VERSION = 1


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
    summaries; ``versions`` are those of the packages that wrote it.
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

    def to_dict(self) -> dict[str, Any]:
        post = self.post_processing
        return asdict(self) | {"post_processing": None if post is None else post.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterMetadata:
        """Keys of newer versions are ignored, but not those of post-processing, which change what is found.

        Raises:
            UserError: The format is newer than this version can read, or a value is invalid.
        """
        found = values.get("format_version", FORMAT_VERSION)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            raise UserError(
                f"{METADATA_FILE} has format {found}; this sam3lora reads up to {FORMAT_VERSION}: install a newer one"
            )
        known = {item.name for item in fields(cls)}
        metadata = cls(**{name: value for name, value in values.items() if name in known})
        expected: dict[str, tuple[type, ...]] = dict.fromkeys(("data", "metrics", "lora", "versions"), (dict,))
        expected |= dict.fromkeys(("base_model", "base_revision", "base_fingerprint"), (str, type(None)))
        expected |= {"prompts": (list,), "resolution": (int, type(None)), "geometry_cls": (bool,)}
        for name, types in expected.items():
            value = getattr(metadata, name)
            if not isinstance(value, types):
                raise UserError(f"{METADATA_FILE}: {name} must be {types[0].__name__}, got {value!r}")
        return replace(metadata, post_processing=_read_post_processing(values))


def _read_post_processing(values: dict[str, Any]) -> PostProcessing | None:
    """The recorded post-processing; the ``thresholds`` of earlier versions count as mask suppression."""
    key = "post_processing" if values.get("post_processing") is not None else "thresholds"
    recorded = values.get(key)
    if recorded is None or recorded == {}:
        return None
    if not isinstance(recorded, dict):
        raise UserError(f"{METADATA_FILE}: {key} must be dict, got {recorded!r}")
    if key == "thresholds":
        renamed = {"threshold" if name == "detection_threshold" else name: value for name, value in recorded.items()}
        recorded = {"nms": "mask"} | {name: renamed[name] for name in PostProcessing.model_fields if name in renamed}
    try:
        return PostProcessing(**recorded)
    except UserError as error:
        raise UserError(f"{METADATA_FILE}: {key}: {error}") from None


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


def read_metadata_values(folder: str | Path) -> dict[str, Any] | None:
    """All values of ``sam3lora.json``, unchecked; None where there is no such file.

    Raises:
        UserError: The file holds no JSON object.
    """
    file = Path(folder) / METADATA_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def recorded_post_processing(metadata: AdapterMetadata | None) -> PostProcessing:
    """The settings that an adapter records; the defaults for the base (None) and for an adapter without any."""
    return (metadata and metadata.post_processing) or PostProcessing()
