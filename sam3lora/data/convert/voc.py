"""Reading Pascal VOC boxes: one XML file per image.

Corners are numbers of pixels inside the box, counted from 1 (VOC development kit, 2012). In our coordinates a box
therefore reaches from `xmin - 1` to `xmax`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet, order_names
from sam3lora.data.convert.layout import image_files, open_image, split_folders
from sam3lora.data.faults import FaultLog
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
    for split, xml_folder, images, stems in _find_splits(source):
        files = {path.stem: path for path in image_files(images)}
        labels = {path.stem: path for path in sorted(xml_folder.glob("*.xml"))}
        wanted = sorted(files.keys() | labels.keys()) if stems is None else stems
        splits[split] = []
        for stem in wanted:
            if stem not in labels:
                log.add("unlabelled_image", str(files.get(stem, images / stem)))
            elif stem not in files:
                log.add("label_without_image", str(labels[stem]))
            elif image := open_image(files[stem], log):
                _read_labels(labels[stem], image, log)
                splits[split].append(image)
    found = {thing.category for images in splits.values() for image in images for thing in image.objects}
    return LabelledSet(order_names(sorted(found), names, source), splits)


def _find_splits(source: Path) -> Iterator[tuple[str, Path, Path, list[str] | None]]:
    """(split, folder of XML files, folder of images, stems or None for all)."""
    xml_folder, images = source / "Annotations", source / "JPEGImages"
    if xml_folder.is_dir():
        if not images.is_dir():
            raise UserError(f"{source} has Annotations but no JPEGImages beside it")
        lists = [source / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val", "test")]
        lists = [path for path in lists if path.is_file()]
        for path in lists:
            stems = [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            yield split_name(path.stem), xml_folder, images, stems
        if not lists:
            yield WHOLE, xml_folder, images, None
        return
    for split, folder in split_folders(source, "*.xml").items():
        yield split, folder, folder, None


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
