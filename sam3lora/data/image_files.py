"""Finding the image files that an annotation file lists."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from sam3lora.data.faults import FaultLog


class ImageFiles:
    """Image files under a folder. Folders are listed once: asking for files one by one is slow on network drives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, set[str]] = {}
        self._by_form: dict[str, dict[str, list[str]]] = {}

    def find(self, names: Sequence[str], log: FaultLog) -> list[str | None]:
        """The path of each listed name, or None; a name is never answered with another file of the same base name.

        If no file at all lies where the list says, as after a move from another machine, all are looked for by their
        base names in the folder and in its `images`, unless two share a base name. A name in another Unicode form than
        its file's (é as one character or as two) is found, and counted.
        """
        found = [self._find(os.path.join(self._folder, name), log) for name in names]
        if any(found):
            return found
        base_names = [os.path.basename(name.replace("\\", "/")) for name in names]
        if len(set(base_names)) < len(set(names)):
            return found
        for place in (self._folder, self._folder / "images"):
            moved = [self._find(os.path.join(place, name), log) for name in base_names]
            if any(moved):
                return moved
        return found

    @property
    def folders(self) -> list[str]:
        """Those that were looked into."""
        return sorted(self._files)

    def names_in(self, folder: str) -> set[str]:
        if folder not in self._files:
            try:
                with os.scandir(folder) as entries:
                    self._files[folder] = {entry.name for entry in entries if _is_file(entry)}
            except (OSError, ValueError):
                self._files[folder] = set()
        return self._files[folder]

    def _find(self, path: str, log: FaultLog) -> str | None:
        for spelling in dict.fromkeys((path, path.replace("\\", "/"))):
            folder, name = os.path.split(spelling)
            if name in self.names_in(folder):
                return spelling
        if not path.isascii():
            return self._find_other_form(path.replace("\\", "/"), log)
        return None

    def _find_other_form(self, path: str, log: FaultLog) -> str | None:
        folder, name = os.path.split(path)
        if folder not in self._by_form:
            by_form: dict[str, list[str]] = {}
            for file in self.names_in(folder):
                by_form.setdefault(unicodedata.normalize("NFC", file), []).append(file)
            self._by_form[folder] = by_form
        same = self._by_form[folder].get(unicodedata.normalize("NFC", name), [])
        if len(same) != 1:
            return None
        log.add("other_unicode_form", name)
        return os.path.join(folder, same[0])


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle, or to where nobody may look
        return False
