"""Reading Pascal VOC boxes: one XML file per image.

Corners are numbers of pixels inside the box, counted from 1 (VOC development kit, 2012). In our coordinates a box
therefore reaches from `xmin - 1` to `xmax`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet, order_names
from sam3lora.data.convert.layout import find_files, key_in, open_image, split_folders
from sam3lora.data.faults import FaultLog
from sam3lora.data.images import IMAGE_SUFFIXES
from sam3lora.data.split_files import WHOLE, split_name
from sam3lora.errors import UserError


def read_voc(source: Path, names: Sequence[str] | None, log: FaultLog) -> LabelledSet:
    """Read all splits.

    Args:
        source: Folder with `Annotations`, `JPEGImages` and, for splits, `ImageSets/Main/<split>.txt`; or one with XML
            files beside the images, with or without a subfolder per split.
        names: Category names in order; None takes those found, in alphabetical order.

    Raises:
        UserError: An XML file is invalid or declares a document type; the message names it.
    """
    splits: dict[str, list[LabelledImage]] = {}
    xml_folder, images = source / "Annotations", source / "JPEGImages"
    if xml_folder.is_dir():
        if not images.is_dir():
            raise UserError(f"{source} has Annotations but no JPEGImages beside it")
        files, labels = _by_key(images, IMAGE_SUFFIXES, True, log), _by_key(xml_folder, [".xml"], True, log)
        lists = _read_lists(source)
        for split, keys in lists.items():
            splits[split] = _read_split(keys, files, labels, images, log)
        if not lists:
            splits[WHOLE] = _read_split(sorted(files.keys() | labels.keys()), files, labels, images, log)
        for key in sorted((files.keys() | labels.keys()) - set(chain.from_iterable(lists.values())) if lists else ()):
            log.add("unlisted_image", str(files.get(key, labels.get(key))))
    else:
        for split, folder in split_folders(source, ".xml").items():
            nested = split != WHOLE
            files, labels = (_by_key(folder, suffixes, nested, log) for suffixes in (IMAGE_SUFFIXES, [".xml"]))
            splits[split] = _read_split(sorted(files.keys() | labels.keys()), files, labels, folder, log)
    found = {thing.category for images in splits.values() for image in images for thing in image.objects}
    return LabelledSet(order_names(sorted(found), names, source), splits)


def _by_key(folder: Path, suffixes: Collection[str], nested: bool, log: FaultLog) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in find_files(folder, suffixes, nested=nested):
        if files.setdefault(key_in(folder, path), path) != path:  # another image of that name
            log.add("unlabelled_image", str(path))
    return files


def _read_lists(source: Path) -> dict[str, list[str]]:
    """Split -> names of its images without suffix."""
    lists = [source / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val", "test")]
    return {
        split_name(path.stem): [
            line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()
        ]
        for path in lists
        if path.is_file()
    }


def _read_split(
    keys: Iterable[str], files: dict[str, Path], labels: dict[str, Path], folder: Path, log: FaultLog
) -> list[LabelledImage]:
    split = []
    for key in keys:
        if key not in labels:
            log.add("unlabelled_image", str(files.get(key, folder / key)))
        elif key not in files:
            log.add("label_without_image", str(labels[key]))
        elif image := open_image(files[key], log):
            _read_labels(labels[key], image, log)
            split.append(image)
    return split


def _read_labels(label_file: Path, image: LabelledImage, log: FaultLog) -> None:
    root = _parse(label_file)
    if root.tag != "annotation":
        raise UserError(f"{label_file}: expected a Pascal VOC <annotation>, got <{root.tag}>")
    height, width = (int(_number(root, f"size/{side}", label_file, default=0)) for side in ("height", "width"))
    if height > 0 and width > 0:
        image.use_label_size((height, width), log, str(label_file))
    for number, entry in enumerate(root.iter("object"), 1):
        where = f"{label_file}, object {number}"
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{where}: no <name>")
        if (entry.findtext("difficult") or "").strip() == "1":
            log.add("difficult", where)
        x0, y0, x1, y1 = (_number(entry, f"bndbox/{key}", where) for key in ("xmin", "ymin", "xmax", "ymax"))
        image.add_box(name, (x0 - 1, y0 - 1, x1, y1), log, where)


class _PlainBuilder(ElementTree.TreeBuilder):
    """Refuses document types: their entities could grow without limit or read other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("declares a document type (DOCTYPE), which label files do not need: remove it")


def _parse(label_file: Path) -> Element:
    try:
        return ElementTree.parse(label_file, ElementTree.XMLParser(target=_PlainBuilder())).getroot()
    except UserError as error:
        raise UserError(f"{label_file} {error}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{label_file} is not valid XML ({error}); is the file truncated?") from None


def _number(element: Element, path: str, where: object, default: float | None = None) -> float:
    text = element.findtext(path)
    if text is None and default is not None:
        return default
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: expected a number in <{path}>, got {text!r}")
    return value
