"""The splits of a COCO data set: finding their annotation files and images in the layouts that tools export.

    <split>/_annotations.coco.json            images beside it, or in <split>/images     ours, Roboflow
    <split>/*.json, <split>/annotations/*.json   if only one of them is a COCO file
    annotations/instances_<split>2017.json    <split>2017/, images/<split>2017/          COCO
    annotations/<split>.json                  images/<split>/, images/                   CVAT and others
    result.json, annotations/instances_default.json  images/                             Label Studio, CVAT: no splits

A file of the configured name (`data.annotation_file`) wins; the other layouts are looked for only without one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sam3lora.data.coco import ANNOTATION_FILE, CocoIndex
from sam3lora.data.json_text import first_file_names, has_lists
from sam3lora.errors import UserError
from sam3lora.local_paths import refuse_bad_path

WHOLE = "."  # name of the only split of a data set without splits
SPLITS = ("train", "valid", "test")

_ALIASES = {"training": "train", "val": "valid", "validation": "valid", "testing": "test"}
_YEAR = re.compile(r"[-_]?\d{4}$")
_INSTANCES = "instances_"
_NOT_INSTANCES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")  # COCO's other tasks
_MOST_JSON_FILES = 20  # a folder with more has a file an image, as LabelMe's
_NUM_NAMES = 50  # file names that are looked for, to tell the folder of the images


@dataclass(frozen=True)
class SplitFiles:
    """The annotation file of a split, and the folder that the file names in it are relative to."""

    name: str  # as the data set calls it (`val`, `train2017`), or `WHOLE`
    annotation_file: Path
    image_dir: Path

    def read(self, on_bad_image: Literal["stop", "skip"] = "stop", *, allow_empty: bool = False) -> CocoIndex:
        return CocoIndex.from_folder(
            self.annotation_file.parent,
            self.annotation_file.name,
            image_dir=self.image_dir,
            on_bad_image=on_bad_image,
            allow_empty=allow_empty,
        )

    @property
    def title(self) -> str:
        """Its name in reports: that of the folder for a set without splits."""
        return self.folder.name if self.name == WHOLE else self.name

    @property
    def folder(self) -> Path:
        """The folder of the annotation file, or of the data set if that is `annotations`."""
        folder = self.annotation_file.parent
        return folder.parent if folder.name == "annotations" else folder

    def __str__(self) -> str:
        """What identifies the split for a reader: its folder, or its file if the folder may hold several."""
        return str(
            self.annotation_file.parent if self.annotation_file.name == ANNOTATION_FILE else self.annotation_file
        )


def split_name(name: str) -> str:
    """Our name of a split.

    >>> split_name("Val"), split_name("train2017"), split_name("night")
    ('valid', 'train', 'night')
    """
    plain = _YEAR.sub("", name.lower())
    plain = _ALIASES.get(plain, plain)
    return plain if plain in SPLITS else name


def find_splits(root: Path, annotation_file: str = ANNOTATION_FILE) -> list[SplitFiles]:
    """All splits of a data set: train, valid and test first, `WHOLE` before them; empty if there is none.

    Args:
        root: Folder of the data set, or of one split.
        annotation_file: Name of the file in the folder of a split. Another one than the default is not guessed at.

    Raises:
        UserError: The folder of a split holds several COCO files, none of that name.
    """
    folders = subfolders(root)
    named = [_beside_images(f.name, f / annotation_file) for f in folders if (f / annotation_file).is_file()]
    if (root / annotation_file).is_file():
        return [_beside_images(WHOLE, root / annotation_file), *named]
    if annotation_file != ANNOTATION_FILE:
        return named
    open_splits = set(SPLITS) - {split_name(split.name) for split in named}
    guessed = [_guess(folder) for folder in folders if split_name(folder.name) in open_splits]
    found = [*named, *(split for split in guessed if split)]
    open_splits -= {split_name(split.name) for split in found}
    found += [split for split in _in_common_folders(root) if not found or split_name(split.name) in open_splits]
    return sorted(found, key=lambda split: _rank(split.name))


def find_split(root: Path, split: str, annotation_file: str = ANNOTATION_FILE) -> SplitFiles | None:
    """One split of a data set, by its own name (`val`, `train2017`) or by ours (`valid`); None if nothing has it.

    Raises:
        UserError: Several could be meant, or the split's folder has no annotation file.
    """
    folder = root / split
    if (folder / annotation_file).is_file():
        return _beside_images(split, folder / annotation_file)
    if annotation_file == ANNOTATION_FILE and folder.is_dir() and (found := _guess(folder)):
        return found
    if not root.is_dir():
        return None
    splits = [found for found in find_splits(root, annotation_file) if found.name != WHOLE]
    matches = [found for found in splits if split in (found.name, found.annotation_file.stem)]
    matches = matches or [found for found in splits if split_name(found.name) == split_name(split)]
    if len(matches) > 1:
        names = [match.name for match in matches]
        files = " and ".join(str(match.annotation_file) for match in matches)
        raise UserError(
            f"{files} could each be the split {split}: name the one you mean, {' or '.join(names)}, with "
            "data.train_split, data.valid_split or --split"
        )
    if matches:
        return matches[0]
    empty = [path for path in subfolders(root) if split_name(path.name) == split_name(split)]
    if empty or folder.is_dir():
        raise UserError(_no_annotation_file(root, (empty or [folder])[0], annotation_file))
    return None


def required_split(root: Path, split: str, annotation_file: str = ANNOTATION_FILE) -> SplitFiles:
    """As `find_split`.

    Raises:
        UserError: There is no such split, too; the message says what was found instead.
    """
    found = find_split(root, split, annotation_file)
    if found is not None:
        return found
    if not root.is_dir():
        what = "or of one of its splits" if split == WHOLE else f"that holds {split}/"
        raise UserError(f"no folder {root}; expected the folder of a COCO data set {what}")
    others = find_splits(root, annotation_file)
    if any(other.name == WHOLE for other in others):
        hint = f"found {others[0].annotation_file}, a set without splits: make them with sam3lora data split {root} NEW"
    elif others:
        names = ", ".join(other.name for other in others)
        hint = f"found {names}: name the one to use, with data.train_split, data.valid_split or --split"
    else:
        raise UserError(no_splits(root, annotation_file))
    raise UserError(f"{missing_split(root, split, annotation_file)}; {hint}")


def find_split_or_whole(root: str | Path, split: str = "valid", annotation_file: str = ANNOTATION_FILE) -> SplitFiles:
    """All of a folder that is itself a split, or a set without splits; else `required_split`. Paths are absolute."""
    refuse_bad_path(root, "the data folder")
    root = Path(root).expanduser().absolute()
    if (root / annotation_file).is_file():
        return _beside_images(WHOLE, root / annotation_file)
    if root.is_dir() and (whole := [found for found in find_splits(root, annotation_file) if found.name == WHOLE]):
        return whole[0]
    return required_split(root, split, annotation_file)


def split_of_file(annotation_file: Path) -> SplitFiles:
    """The split of an annotation file, in whichever layout it lies."""
    folder = annotation_file.parent
    if folder.name == "annotations":
        return _in_common_folder(folder.parent, _name_of(annotation_file), annotation_file)
    return _beside_images(_name_of(annotation_file), annotation_file)


def missing_split(root: Path, split: str, annotation_file: str = ANNOTATION_FILE) -> str:
    """That a split is missing, and where it was looked for."""
    ours = split_name(split)
    names = dict.fromkeys([split, ours, *(alias for alias, name in _ALIASES.items() if name == ours)])
    *first, last = (f"{name}/" for name in names)
    folders = f"{', '.join(first)} and {last}" if first else last
    text = f"{root} has no {split} split: looked for {annotation_file} in {folders}"
    return text if annotation_file != ANNOTATION_FILE else f"{text}, and for files named so in annotations/"


def no_splits(root: Path, annotation_file: str = ANNOTATION_FILE) -> str:
    """That a folder holds no COCO data set, and what it holds instead."""
    found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    others = "" if annotation_file != ANNOTATION_FILE else " and no other COCO file"
    above = root.absolute().parent
    if root.name == "annotations" or (above / "annotations").is_dir():
        advice = f"In COCO's layout, name the folder that holds annotations/ and the images: {above}"
    else:
        advice = _masks_advice(root) or "Labels of another format are converted with sam3lora data convert"
    return f"no {annotation_file} in {root} or its subfolders{others}; found {found}. {advice}"


def subfolders(folder: Path) -> list[Path]:
    """Subfolders by name, without hidden ones; train, valid and test first."""
    with os.scandir(folder) as entries:
        found = [folder / entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
    return sorted(found, key=lambda path: (_rank(path.name), path.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where nobody may look
        return False


def _rank(name: str) -> int:
    """Position of a split in an order of train, valid, test and all others."""
    ours = split_name(name)
    return SPLITS.index(ours) if ours in SPLITS else len(SPLITS)


def _beside_images(name: str, annotation_file: Path) -> SplitFiles:
    folder = annotation_file.parent
    folder = folder.parent if folder.name == "annotations" else folder
    return _split_files(name, annotation_file, [annotation_file.parent, folder, folder / "images", folder / "data"])


def _guess(folder: Path) -> SplitFiles | None:
    """The only COCO file in the folder of a split."""
    files = _coco_files(folder)
    if len(files) > 1:
        raise UserError(
            f"{folder} holds several COCO files, {', '.join(map(str, files))}: set data.annotation_file to the one "
            f"to use, or name it {ANNOTATION_FILE}"
        )
    return _beside_images(folder.name, files[0]) if files else None


def _in_common_folders(root: Path) -> list[SplitFiles]:
    """Splits whose annotation files lie in one folder: a split for each file."""
    files = _coco_files(root)
    if len(files) == 1 and split_name(_name_of(files[0])) not in SPLITS:
        return [_in_common_folder(root, WHOLE, files[0])]
    names = [_name_of(path) for path in files]
    names = [path.stem if names.count(name) > 1 else name for name, path in zip(names, files, strict=True)]
    return [_in_common_folder(root, name, path) for name, path in zip(names, files, strict=True)]


def _in_common_folder(root: Path, name: str, annotation_file: Path) -> SplitFiles:
    own = _name_of(annotation_file)
    places = [place for place in (root, root / "images") if place.is_dir()]
    folders = [folder for place in places for folder in subfolders(place)]
    exact = [folder for folder in folders if folder.name.casefold() == own.casefold()]
    alike = [folder for folder in folders if split_name(folder.name) == split_name(own)]
    common = [root / "images", root / "data", root, annotation_file.parent]
    return _split_files(name, annotation_file, [*exact, *alike, *common])


def _split_files(name: str, annotation_file: Path, candidates: Sequence[Path]) -> SplitFiles:
    """The split with the candidate that holds most of its first images; the first such candidate."""
    folders = list(dict.fromkeys(path for path in candidates if path.is_dir()))
    names = first_file_names(annotation_file, _NUM_NAMES) if len(folders) > 1 else []
    best, most = folders[0], 0
    for folder in folders:
        count = sum(os.path.isfile(folder / file_name) for file_name in names)
        if count > most:
            best, most = folder, count
        if most == len(names):
            break
    return SplitFiles(name, annotation_file, best)


def _name_of(annotation_file: Path) -> str:
    """The split that the name of a file says.

    >>> _name_of(Path("annotations/instances_train2017.json"))
    'train2017'
    """
    return annotation_file.stem.removeprefix(_INSTANCES)


def _coco_files(folder: Path) -> list[Path]:
    """COCO instance files in a folder, and in `annotations` within it."""
    found: list[Path] = []
    for place in (folder, folder / "annotations"):
        files = sorted(path for path in place.glob("*.json") if path.is_file())  # no pipes or devices
        if len(files) <= _MOST_JSON_FILES:
            found += (path for path in files if not path.name.startswith(_NOT_INSTANCES) and _holds_instances(path))
    return found


def _holds_instances(path: Path) -> bool:
    return path.name.startswith(_INSTANCES) or has_lists(path, "images", "annotations")


def _masks_advice(root: Path) -> str:
    from sam3lora.data.convert.mask_folders import masks_advice  # which needs this module

    return masks_advice(root)


def _no_annotation_file(root: Path, folder: Path, annotation_file: str) -> str:
    found = sorted(path.name for path in folder.glob("*.json"))[:5]
    hint = f"found {', '.join(found)}: set data.annotation_file" if found else "found no COCO file there"
    if advice := _masks_advice(root):
        hint += f". {advice}"
    return f"no annotation file {folder / annotation_file}; {hint}"
