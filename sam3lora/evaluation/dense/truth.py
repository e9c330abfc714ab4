"""The label maps that the folder of a dense run is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sam3lora.data.label_maps import LabelMaps
from sam3lora.data.prompts import prompt_key
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder_files import METADATA_FILE, shown
from sam3lora.model.adapter.metadata import AdapterMetadata
from sam3lora.model.dense.settings import BACKGROUND, DenseSettings

VALUES = "value_of_category"
"""Key of the recorded data: which value each category had in the label maps of the training."""


def true_labels(metadata: AdapterMetadata, settings: DenseSettings) -> LabelMaps:
    """The values that categories had in training; by the names of the classes where a folder does not record them.

    Raises:
        UserError: The record is damaged.
    """
    num_values = sum(len(names) - 1 for names in settings.names_of_maps)
    recorded: Any = metadata.data.get(VALUES)
    if recorded is None:
        named = [name for name in settings.classes if prompt_key(name) != BACKGROUND]
        recorded = {prompt_key(name): number for number, name in enumerate(named, 1)}
    valid = range(1, num_values + 1)
    if (
        not isinstance(recorded, dict)
        or not recorded
        or not all(type(v) is int and v in valid for v in recorded.values())
    ):
        raise UserError(
            f"{METADATA_FILE}: data.{VALUES} must give categories a value from 1 to {num_values}, got {shown(recorded)}"
        )
    return LabelMaps(recorded, overlapping=settings.mode == "multilabel")


def label_notes(labels: LabelMaps, categories: Sequence[str], source: str) -> list[str]:
    """What a reader should know of a split's categories that are no class of the model.

    Raises:
        UserError: None of them is one, and there are some.
    """
    others = [name for name in categories if prompt_key(name) not in labels.values]
    if others and len(others) == len(categories):
        raise UserError(
            f"{source}: no category is a class of this model: it was trained on {', '.join(labels.values)}; the data "
            f"have {', '.join(others)}"
        )
    others = [name for name in others if prompt_key(name) != BACKGROUND]
    return [f"counted as background, because they are no class of the model: {', '.join(others)}"] if others else []
