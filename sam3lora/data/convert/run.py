"""From a folder in one format to a new folder in another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sam3lora.data.convert.faults import FaultLog
from sam3lora.data.convert.labelled_set import LabelledSet
from sam3lora.data.convert.layout import find_pairs, new_folder, subfolders
from sam3lora.data.convert.names import checked_names
from sam3lora.data.convert.read_coco import find_coco_folders, read_coco
from sam3lora.data.convert.read_labelme import read_labelme
from sam3lora.data.convert.read_masks import read_masks
from sam3lora.data.convert.read_voc import read_voc
from sam3lora.data.convert.read_yolo import read_yolo
from sam3lora.data.convert.report import ConversionReport
from sam3lora.data.convert.write_coco import write_coco
from sam3lora.data.convert.write_masks import write_masks
from sam3lora.data.convert.write_yolo import write_yolo
from sam3lora.errors import UserError

SOURCE_FORMATS = {
    "coco": "_annotations.coco.json beside the images",
    "yolo": "text files in labels/ and images in images/",
    "voc": "XML files beside the images, or Annotations/ and JPEGImages/",
    "masks": "mask images in masks/ and images in images/",
    "labelme": "JSON files with shapes beside the images",
}
TARGET_FORMATS = ("coco", "yolo", "yolo-boxes", "masks")


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
        source: Its folder.
        target: Folder to write, new or empty; it appears whole at the end or not at all.
        source_format: One of `SOURCE_FORMATS`; None tells it from the files.
        target_format: One of `TARGET_FORMATS`.
        names: Category names in order, where the source does not say them (YOLO by class index, masks from value 1) or
            in place of those it says.
        instances: Mask images (read or written) number objects and not categories.
        components: Every connected part of a category in a mask image is an object.

    Raises:
        UserError: An unknown or ambiguous format, no label at all, a label file that cannot be right, or a target that
            holds something.
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
        raise UserError("--components takes semantic masks apart: it needs --from masks, without --instances")
    log = FaultLog()
    with new_folder(target, source) as folder:
        names = checked_names(names, "--names") if names else None
        labelled = _read(source, source_format, names, log, instances, components)
        if not any(image.objects for image in labelled.images()):
            raise UserError(
                f"{source}: found {sum(map(len, labelled.splits.values()))} images and no labelled object as "
                f"{source_format}; expected {SOURCE_FORMATS[source_format]}"
            )
        if target_format != "coco":
            labelled.drop_crowds(log)
        _write(labelled, folder, target_format, log, instances)
    return ConversionReport(str(target), source_format, target_format, labelled.summary(), list(log))


def guess_format(source: Path) -> str:
    """The one format whose files lie in a folder.

    Raises:
        UserError: None, or several.
    """
    folders = [source, *subfolders(source)]
    labels = [path for _, path in find_pairs(source, "labels").values()]
    masks = [path for _, path in find_pairs(source, "masks").values()]
    json_files = (path for folder in folders for path in folder.glob("*.json"))
    found = {
        "coco": bool(find_coco_folders(source)),
        "yolo": any(any(folder.glob("*.txt")) for folder in labels),
        "voc": any(any(folder.glob("*.xml")) for folder in [*folders, source / "Annotations"]),
        "masks": any(folder.is_dir() for folder in masks),
        "labelme": any(b'"shapes"' in path.read_bytes() for path in json_files),
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
