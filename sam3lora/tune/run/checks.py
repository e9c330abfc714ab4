"""Checks of the data before the first trial: a mistake there would fail all of them."""

from __future__ import annotations

from pathlib import Path

from sam3lora.data.fault_report import faults_as_reason
from sam3lora.data.split_files import SplitFiles, find_split, missing_split
from sam3lora.errors import UserError
from sam3lora.training.datasets import RunData
from sam3lora.training.task import task_of
from sam3lora.tune.space.search_space import SearchSpace

_ANY_RESOLUTION, _ANY_PATCH = 1008, 14


def check_data(space: SearchSpace) -> RunData:
    """The data of the base configuration, after a check that trials can be compared on both splits.

    Raises:
        UserError: A split is missing or damaged, or the metric is not defined on the validation images.
    """
    config, root = space.base, checked_data_dir(space)
    task = task_of(config)
    data = task.load_data(config, config.model.resolution or _ANY_RESOLUTION, _ANY_PATCH)
    _, reason = task.deciding_metric(config.changed(space.best_adapter_keys()), data)
    if reason:
        faults = [fault for fault in data.faults if fault["split"] == config.data.valid_split]
        raise UserError(
            f"search.metric {space.search.metric} cannot be measured on {root / config.data.valid_split}: {reason}. "
            f"Choose another metric, or other validation images{faults_as_reason(faults)}"
        )
    return data


def checked_data_dir(space: SearchSpace) -> Path:
    """The data folder of the base configuration; UserError if it lacks training or validation images."""
    data, root = space.base.data, space.base.training.required_data_dir().absolute()
    for split in (data.train_split, data.valid_split):
        if find_split(root, split, data.annotation_file) is None:
            raise UserError(
                "a sweep compares trials on validation images, but "
                f"{missing_split(root, split, data.annotation_file)}. Make both splits with sam3lora data split, or "
                "name them with data.train_split and data.valid_split"
            )
    return root


def held_out_split(space: SearchSpace) -> SplitFiles | None:
    """The split that is measured at the end, if there is one; UserError if it cannot be read."""
    split, config = space.search.held_out_split, space.base
    if split is None or config.training.data_dir is None:
        return None
    return find_split(config.training.required_data_dir().absolute(), split, config.data.annotation_file)
