"""The splits of a dense run: every image counts, also one without a label."""

from __future__ import annotations

from sam3lora.config import Config
from sam3lora.data.coco import merge_names
from sam3lora.data.index_columns import object_columns
from sam3lora.errors import UserError
from sam3lora.training.datasets import RunData, Splits, decode_settings, mask_grid, read_splits, run_data
from sam3lora.training.dense.classes import DenseClasses, choose_classes


def load_dense_data(
    config: Config, resolution: int, patch_size: int, splits: Splits | None = None
) -> tuple[RunData, DenseClasses]:
    """Index both splits, and say what their label maps hold.

    Raises:
        UserError: The training split has no label, or the classes are not those of the data.
    """
    train, valid = splits or read_splits(config)
    if not object_columns(train.table).count_per_image().any():
        raise UserError(f"{train.source}: no label of a chosen category, so every pixel would be background")
    names = merge_names([train, valid] if valid else [train])
    classes = choose_classes(config.dense, names)
    settings = decode_settings(
        config, names, resolution, mask_grid(resolution, patch_size), num_negatives=0, label_maps=classes.labels
    )
    return run_data(config, (train, valid), settings, classes.names), classes
