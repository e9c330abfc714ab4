"""Converting a labelled data set from a folder in one format to a new folder in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from sam3lora.data.convert.coco_folders import read_coco, write_coco
from sam3lora.data.convert.labelled_set import LabelledSet, checked_names
from sam3lora.data.convert.labelme import read_labelme
from sam3lora.data.convert.layout import find_files, new_folder, split_folders
from sam3lora.data.convert.mask_folders import find_mask_folders
from sam3lora.data.convert.mask_images import read_masks, write_masks
from sam3lora.data.convert.voc import read_voc
from sam3lora.data.convert.yolo import read_yolo, write_yolo
from sam3lora.data.convert.yolo_files import has_labels
from sam3lora.data.faults import Fault, FaultLog
from sam3lora.data.json_text import has_lists
from sam3lora.data.split_files import find_splits
from sam3lora.errors import UserError

SOURCE_FORMATS = {
    "coco": "_annotations.coco.json beside the images, or annotations/*.json with images/",
    "yolo": "text files in labels/ and images in images/",
    "voc": "XML files beside the images, or Annotations/ and JPEGImages/",
    "masks": "mask images in masks/ (mask, gt) and images in images/ (image, imgs), or folders such as train-mask",
    "labelme": "JSON files with shapes beside the images",
}
TARGET_FORMATS = ("coco", "yolo", "yolo-boxes", "masks")


@dataclass
class ConversionReport:
    """What `convert_folder` wrote to `target`."""

    target: str
    source_format: str
    target_format: str
    splits: dict[str, dict[str, Any]]  # see `LabelledSet.summary`
    faults: list[Fault] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "faults": [fault.to_dict() for fault in self.faults]}


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    source_format: str | None = None,
    target_format: str = "coco",
    names: Sequence[str] | None = None,
    instances: bool = False,
    components: bool = False,
) -> ConversionReport:
    """Convert a labelled data set; image files are hard-linked or copied, never encoded again.

    Args:
        target: Folder to write, new or empty; after an error nothing is left in it.
        source_format: One of `SOURCE_FORMATS`; None detects it from the files.
        target_format: One of `TARGET_FORMATS`.
        names: Category names in order (YOLO by class index, masks from value 1); None takes those of the source.
        instances: Mask images (read or written) number objects instead of categories.
        components: Every connected part of a category in a mask image is an object.

    Raises:
        UserError: The format is unknown or ambiguous, there is no label, a label file is invalid, or the target is not
            empty.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise UserError(f"no folder {source}; expected a labelled data set")
    if target_format not in TARGET_FORMATS:
        raise UserError(f"unknown format {target_format!r}; expected one of {', '.join(TARGET_FORMATS)}")
    source_format = source_format or guess_format(source)
    if source_format not in SOURCE_FORMATS:
        raise UserError(f"unknown format {source_format!r}; expected one of {', '.join(SOURCE_FORMATS)}")
    if instances and (source_format == "masks") == (target_format == "masks"):
        raise UserError("--instances says how mask images are numbered: exactly one of --from and --to must be masks")
    if components and (source_format != "masks" or instances):
        raise UserError("--components splits semantic masks: it needs --from masks, without --instances")
    log = FaultLog()
    with new_folder(target, source) as folder:
        names = checked_names(names, "--names") if names else None
        labelled = _read(source, source_format, names, log, instances, components)
        if not any(image.objects for image in labelled.images()):
            raise UserError(
                f"{source}: found {sum(map(len, labelled.splits.values()))} images and no labelled object as "
                f"{source_format}; expected {SOURCE_FORMATS[source_format]}"
            )
        if target_format != "coco" and (target_format != "masks" or instances):
            labelled.drop_crowds(log)
        labelled.drop_incomplete(log)
        _write(labelled, folder, target_format, log, instances)
    return ConversionReport(str(target), source_format, target_format, labelled.summary(), list(log))


def guess_format(source: Path) -> str:
    """The format of the labels in a folder.

    Raises:
        UserError: There are no labels, or labels in several formats.
    """
    masks = [path for _, path in find_mask_folders(source).values()]
    json_files = chain.from_iterable(
        find_files(folder, [".json"]) for folder in split_folders(source, ".json").values()
    )
    found = {
        "coco": bool(find_splits(source)),
        "yolo": has_labels(source),
        "voc": bool(split_folders(source, ".xml")),
        "masks": any(folder.is_dir() for folder in masks),
        "labelme": any(has_lists(path, "shapes") for path in json_files),
    }
    formats = [name for name, is_there in found.items() if is_there]
    if not formats:
        known = "; ".join(f"{name}: {where}" for name, where in SOURCE_FORMATS.items())
        raise UserError(f"{source}: no labels found. Known are {known}")
    if len(formats) > 1:
        raise UserError(f"{source} holds labels as {' and as '.join(formats)}: choose one with --from")
    return formats[0]


def _read(
    source: Path, source_format: str, names: list[str] | None, log: FaultLog, instances: bool, components: bool
) -> LabelledSet:
    if source_format == "masks":
        return read_masks(source, names, log, instances=instances, components=components)
    readers = {"coco": read_coco, "yolo": read_yolo, "voc": read_voc, "labelme": read_labelme}
    return readers[source_format](source, names, log)


def _write(labelled: LabelledSet, folder: Path, target_format: str, log: FaultLog, instances: bool) -> None:
    if target_format == "coco":
        write_coco(labelled, folder, log)
    elif target_format == "masks":
        write_masks(labelled, folder, log, instances=instances)
    else:
        write_yolo(labelled, folder, log, boxes=target_format == "yolo-boxes")
