"""From a data folder and an adapter folder to metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.evaluate.split import SplitMetrics, evaluate_split
from sam3lora.model.adapter_folder import load_adapter, read_metadata
from sam3lora.model.forward import StagedSam3
from sam3lora.model.loading import load_base


def evaluate(
    data_dir: str | Path,
    *,
    adapter: str | Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    split: str = "valid",
    annotation_file: str = ANNOTATION_FILE,
    categories: Sequence[str] | None = None,
    prompts: Mapping[str, str] | None = None,
    resolution: int | None = None,
    geometry_cls: bool | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> SplitMetrics:
    """Measure an adapter, or a base model, on a COCO split.

    What is None is taken from the adapter's metadata, so that it is measured the way it was trained.

    Args:
        data_dir: Folder that holds `split`.
        adapter: Adapter folder; None measures the base model.
        model: Base model: "tiny", a hub id or a folder. Without an adapter, None is the built-in tiny model.
        revision: Branch, tag or commit of a hub id.
        split: Folder of the images and annotations.
        annotation_file: Name of the annotation file.
        categories: Names to ask for; None takes those of the split.
        prompts: Category name -> prompt, where it is not the name.
        resolution: Side of the model's input in pixels.
        geometry_cls: Whether text prompts are followed by the geometry CLS token; without an adapter, None is True.
        device: None takes a GPU if there is one.
        batch_size: Images at a time.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: No such folder, a damaged file, or an adapter of another base model.
    """
    index = CocoIndex.from_folder(Path(data_dir) / split, annotation_file)
    metadata = read_metadata(adapter) if adapter is not None else None
    if metadata is not None:
        model = model or metadata.base_model
        revision = revision or metadata.base_revision
        resolution = resolution or metadata.resolution
        geometry_cls = metadata.geometry_cls if geometry_cls is None else geometry_cls
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(model or "tiny", revision=revision, device=device, resolution=resolution)
    if adapter is not None:
        load_adapter(base.model, adapter)  # puts its layers into this model
    return evaluate_split(
        StagedSam3(base.model, geometry_cls=geometry_cls is not False),
        base.tokenizer,
        index,
        resolution=base.resolution,
        names=categories,
        prompts=prompts,
        image_mean=base.image_mean,
        image_std=base.image_std,
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
