"""What an adapter folder says about itself, in ``sam3lora.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from sam3lora.errors import UserError

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
    """Everything needed to use an adapter the way it was trained; all JSON values.

    Attributes:
        base_model, base_revision, base_fingerprint: the base it belongs to (see :func:`sam3lora.model.fingerprint`).
        prompts: the concepts it was trained on.
        resolution: side of the model input in pixels.
        geometry_cls: whether the geometry CLS token follows the text tokens.
        thresholds: for example ``detection_threshold`` and ``nms_iou``.
        data, metrics: summaries of the data set and of the evaluation.
        lora: the settings it was made with.
        versions: of the packages that wrote it.
    """

    base_model: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    prompts: list[str] = field(default_factory=list)
    resolution: int | None = None
    geometry_cls: bool = True
    thresholds: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=current_versions)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterMetadata:
        """Keys of newer versions are ignored.

        Raises:
            UserError: a format newer than this version can read, or a value of the wrong type.
        """
        found = values.get("format_version", FORMAT_VERSION)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            raise UserError(
                f"{METADATA_FILE} has format {found}; this sam3lora reads up to {FORMAT_VERSION}: install a newer one"
            )
        known = {item.name for item in fields(cls)}
        metadata = cls(**{name: value for name, value in values.items() if name in known})
        expected: dict[str, tuple[type, ...]] = dict.fromkeys(
            ("thresholds", "data", "metrics", "lora", "versions"), (dict,)
        )
        expected |= dict.fromkeys(("base_model", "base_revision", "base_fingerprint"), (str, type(None)))
        expected |= {"prompts": (list,), "resolution": (int, type(None)), "geometry_cls": (bool,)}
        for name, types in expected.items():
            value = getattr(metadata, name)
            if not isinstance(value, types):
                raise UserError(f"{METADATA_FILE}: {name} must be {types[0].__name__}, got {value!r}")
        for name, value in metadata.thresholds.items():
            if not isinstance(value, int | float):
                raise UserError(f"{METADATA_FILE}: thresholds.{name} must be a number, got {value!r}")
        return metadata


def read_metadata(folder: str | Path) -> AdapterMetadata | None:
    """Metadata of an adapter folder; None for a plain PEFT adapter that has none.

    Raises:
        UserError: the file is damaged.
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
    try:
        return AdapterMetadata.from_dict(values)
    except UserError as error:
        raise UserError(f"{Path(folder)}: {error}") from None
