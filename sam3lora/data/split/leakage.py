"""Leaks between splits: images of one split whose picture is also in another."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import PurePosixPath

NEIGHBOUR_FRAMES = 2

_EXPORT_HASH = re.compile(r"^(?P<stem>.+)\.rf\.[0-9A-Za-z]{16,}$")
_EXPORT_SUFFIX = re.compile(r"(?:_(?:jpe?g|png|bmp|webp|tiff?))+$", re.IGNORECASE)
_FRAME = re.compile(r"^(?P<prefix>.*\d.*[_-])(?P<number>\d+)$")


@dataclass
class Leak:
    """Images shared by two splits, detected in one way.

    Args:
        kind: "same_content" (identical files), "same_source" (exports of one picture under different names) or
            "neighbouring_frames" (numbered names at most two apart: probably frames or tiles of one recording).
        count: Number of such images in the second split.
    """

    kind: str
    splits: tuple[str, str]
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "splits": list(self.splits), "count": self.count, "examples": self.examples}


def source_name(file_name: str) -> str:
    """Name of the picture that a file was exported from.

    >>> source_name("images/GX01_000018_jpg.rf.c66c9a0ba987e31946504347c2dd9c00.jpg")
    'GX01_000018_jpg'
    """
    stem = PurePosixPath(file_name.replace("\\", "/")).stem
    match = _EXPORT_HASH.match(stem)
    return match["stem"] if match else stem


def count_augmented_copies(file_names: Iterable[str]) -> int:
    """Number of files beyond the first of each exported picture, within one split."""
    names = [name for name in file_names if _is_export(name)]
    return len(names) - len({source_name(name) for name in names})


def find_leaks(splits: Mapping[str, Mapping[str, str]]) -> list[Leak]:
    """The leaks between all pairs of splits; an image counts only under the most certain kind.

    Args:
        splits: Split name -> {file name: hash of the file's content}.
    """
    return [leak for a, b in combinations(splits, 2) for leak in _compare(a, splits[a], b, splits[b]) if leak.count]


def _compare(name_a: str, a: Mapping[str, str], name_b: str, b: Mapping[str, str]) -> list[Leak]:
    by_hash = {digest: name for name, digest in a.items()}
    by_source = {source_name(name): name for name in a}
    by_prefix: dict[str, dict[int, str]] = defaultdict(dict)
    for name in a:
        frame = _frame(name)
        if frame:
            by_prefix[frame[0]][frame[1]] = name
    leaks = {kind: Leak(kind, (name_a, name_b)) for kind in ("same_content", "same_source", "neighbouring_frames")}
    for name, digest in b.items():
        kind, other = "same_content", by_hash.get(digest)
        if other is None:
            kind, other = "same_source", by_source.get(source_name(name))
            if other is not None and not (_is_export(name) or _is_export(other)):
                other = None  # splits may each number their pictures from 0, so an equal name alone proves nothing
        frame = _frame(name)
        if other is None and frame:
            numbers = by_prefix.get(frame[0], {})
            near = [n for n in range(frame[1] - NEIGHBOUR_FRAMES, frame[1] + NEIGHBOUR_FRAMES + 1) if n in numbers]
            kind, other = "neighbouring_frames", numbers[near[0]] if near else None
        if other is not None:
            leaks[kind].count += 1
            if len(leaks[kind].examples) < 3:
                leaks[kind].examples.append(f"{name_a}/{other} = {name_b}/{name}")
    return list(leaks.values())


def _is_export(file_name: str) -> bool:
    return _EXPORT_HASH.match(PurePosixPath(file_name.replace("\\", "/")).stem) is not None


def _frame(file_name: str) -> tuple[str, int] | None:
    match = _FRAME.match(_EXPORT_SUFFIX.sub("", source_name(file_name)))
    return (match["prefix"], int(match["number"])) if match else None
