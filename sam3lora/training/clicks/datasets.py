"""The splits of a run of task clicks: images with a labelled mask that is no crowd region."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sam3lora.config import Config
from sam3lora.data.coco import CocoIndex, merge_names
from sam3lora.data.fault_report import split_faults
from sam3lora.data.index_columns import object_columns
from sam3lora.data.sample import DecodeSettings
from sam3lora.data.split_files import missing_split
from sam3lora.errors import UserError
from sam3lora.training.datasets import RunData, Splits, data_digest, read_splits

MASK_PIXELS_OF_PATCH = 4
"""Pixels of a mask to a side of a patch, as the click head predicts them."""


def load_click_data(config: Config, resolution: int, patch_size: int, splits: Splits | None = None) -> RunData:
    """Index both splits, and leave out the images without an object to click on.

    Raises:
        UserError: The training split has no mask.
    """
    data, training = config.data, config.training
    train, valid = splits or read_splits(config)
    settings = DecodeSettings(
        names=merge_names([train, valid] if valid else [train]),
        resolution=resolution,
        mask_size=resolution // patch_size * MASK_PIXELS_OF_PATCH,
        augmentation=data.augmentation,
        horizontal_flip=data.horizontal_flip,
        vertical_flip=data.vertical_flip,
        num_negatives=0,
        exhaustive=False,  # so that no absent category is asked for
        max_per_image=config.clicks.objects_per_image,
        on_bad_image=training.on_bad_image,
        seed=training.seed,
    )
    train_masked = _with_masks(train)
    if train_masked is None:
        raise UserError(f"{train.source}: no object of a chosen category has a mask, and task clicks learns masks")
    faults = split_faults(data.train_split, train.faults)
    faults += split_faults(data.valid_split, valid.faults) if valid else []
    root = training.required_data_dir()
    valid_masked = _with_masks(valid) if valid else None
    no_valid = None
    if valid is None:
        no_valid = missing_split(root, data.valid_split, data.annotation_file)
    elif valid_masked is None:
        no_valid = f"{valid.source}, which has no mask of a chosen category"
    return RunData(
        train=train_masked,
        valid=valid_masked,
        valid_complete=valid_masked,
        train_settings=settings,
        valid_settings=replace(settings, augmentation="none", horizontal_flip=0.0, vertical_flip=0.0, seed=0),
        prompts=settings.names,
        faults=faults,
        digest=data_digest(train, valid),
        no_valid=no_valid,
    )


def _with_masks(index: CocoIndex) -> CocoIndex | None:
    """The images with a mask that is no crowd region; None if there is none."""
    objects = object_columns(index.table)
    has_mask = [np.zeros(0, bool)]
    for chunk in index.table["annotations"].chunks:
        segmentations: pa.Array = chunk.flatten().field("segmentation")
        has_mask.append(pc.is_valid(segmentations).to_numpy(zero_copy_only=False))
    rows = np.flatnonzero(objects.count_per_image(np.concatenate(has_mask) & ~objects.crowd_T))
    return index.select_rows(rows.tolist()) if len(rows) else None
