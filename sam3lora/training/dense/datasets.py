"""The splits of a dense run: every image counts, also one without a label."""

from __future__ import annotations

from dataclasses import replace

from sam3lora.config import Config
from sam3lora.data.coco import merge_names
from sam3lora.data.fault_report import split_faults
from sam3lora.data.index_columns import object_columns
from sam3lora.data.sample import DecodeSettings
from sam3lora.data.split_files import missing_split
from sam3lora.errors import UserError
from sam3lora.training.datasets import RunData, Splits, data_digest, read_splits
from sam3lora.training.dense.classes import DenseClasses, choose_classes

LABELS_OF_PATCH = 4
"""Pixels of a label map to a side of a patch, where the head predicts."""


def load_dense_data(
    config: Config, resolution: int, patch_size: int, splits: Splits | None = None
) -> tuple[RunData, DenseClasses]:
    """Index both splits, and say what their label maps hold.

    Raises:
        UserError: The training split has no label, or the classes are not those of the data.
    """
    data, training = config.data, config.training
    train, valid = splits or read_splits(config)
    if not object_columns(train.table).count_per_image().any():
        raise UserError(f"{train.source}: no label of a chosen category, so every pixel would be background")
    names = merge_names([train, valid] if valid else [train])
    classes = choose_classes(config.dense, names)
    settings = DecodeSettings(
        names=names,
        resolution=resolution,
        mask_size=resolution // patch_size * LABELS_OF_PATCH,
        augmentation=data.augmentation,
        horizontal_flip=data.horizontal_flip,
        vertical_flip=data.vertical_flip,
        num_negatives=0,
        on_bad_image=training.on_bad_image,
        seed=training.seed,
        label_maps=classes.labels,
    )
    faults = split_faults(data.train_split, train.faults)
    faults += split_faults(data.valid_split, valid.faults) if valid else []
    root = training.required_data_dir()
    run_data = RunData(
        train=train,
        valid=valid,
        valid_complete=valid,
        train_settings=settings,
        valid_settings=replace(settings, augmentation="none", horizontal_flip=0.0, vertical_flip=0.0, seed=0),
        prompts=classes.names,
        faults=faults,
        digest=data_digest(train, valid),
        no_valid=None if valid else missing_split(root, data.valid_split, data.annotation_file),
    )
    return run_data, classes
