"""The splits of a run of task clicks: images with a labelled mask that is no crowd region."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sam3lora.config import Config
from sam3lora.data.coco import CocoIndex, merge_names
from sam3lora.data.index_columns import object_columns
from sam3lora.errors import UserError
from sam3lora.training.datasets import RunData, Splits, decode_settings, mask_grid, read_splits, run_data


def load_click_data(config: Config, resolution: int, patch_size: int, splits: Splits | None = None) -> RunData:
    """Index both splits, and leave out the images without an object to click on.

    Raises:
        UserError: The training split has no mask.
    """
    train, valid = splits or read_splits(config)
    settings = decode_settings(
        config,
        merge_names([train, valid] if valid else [train]),
        resolution,
        mask_grid(resolution, patch_size),
        num_negatives=0,
        exhaustive=False,  # so that no absent category is asked for
        max_per_image=config.clicks.objects_per_image,
    )
    train_masked, valid_masked = _with_masks(train), _with_masks(valid) if valid else None
    if train_masked is None:
        raise UserError(f"{train.source}: no object of a chosen category has a mask, and task clicks learns masks")
    found = run_data(config, (train, valid), settings, settings.names)
    found.train, found.valid, found.valid_complete = train_masked, valid_masked, valid_masked
    if valid is not None and valid_masked is None:
        found.no_valid = f"{valid.source}, which has no mask of a chosen category"
    return found


def _with_masks(index: CocoIndex) -> CocoIndex | None:
    """The images with a mask that is no crowd region; None if there is none."""
    objects = object_columns(index.table)
    has_mask = [np.zeros(0, bool)]
    for chunk in index.table["annotations"].chunks:
        segmentations: pa.Array = chunk.flatten().field("segmentation")
        has_mask.append(pc.is_valid(segmentations).to_numpy(zero_copy_only=False))
    rows = np.flatnonzero(objects.count_per_image(np.concatenate(has_mask) & ~objects.crowd_T))
    return index.select_rows(rows.tolist()) if len(rows) else None
