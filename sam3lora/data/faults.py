"""Faults of a data set: what they are called, what is done about them, how often they occur."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_EXAMPLES = 3

# kind -> (what it is, what is done about it)
KINDS: dict[str, tuple[str, str]] = {
    "missing_image": ("image listed in the annotation file but not found", "left out"),
    "unreadable_image": ("image that cannot be decoded", "left out (training.on_bad_image: skip) or stops the run"),
    "duplicate_image_id": ("image id used twice", "the first image keeps the id, the other is left out"),
    "duplicate_file_name": ("file listed under several image ids", "every listing is kept"),
    "bad_image_entry": ("image entry without usable id or file_name", "left out"),
    "size_mismatch": (
        "image size differs from the annotation file",
        "the real size is used; coordinates are taken relative to the size in the file",
    ),
    "no_size": ("image entry without width and height", "the size is read from the image"),
    "unused_category": ("category row without any annotation", "not a prompt and not a negative"),
    "duplicate_category_name": ("several category ids with one name", "treated as one category"),
    "unknown_category": ("annotation of a category that is not listed", "dropped"),
    "unknown_image": ("annotation of an image that is not listed", "dropped"),
    "duplicate_annotation": ("annotation listed twice", "the copy is dropped"),
    "duplicate_annotation_id": ("annotation id used by two different objects", "both kept, the second gets a new id"),
    "bad_annotation": ("annotation that is not an object with integer ids", "dropped"),
    "short_polygon": ("polygon part with fewer than 3 points", "the part is dropped"),
    "bad_polygon": ("polygon part with an odd number of values or non-finite numbers", "the part is dropped"),
    "bad_rle": ("run-length mask that does not fill its size", "the mask is dropped, the box is kept"),
    "rle_size_mismatch": ("run-length mask of another size than its image", "the mask is rescaled"),
    "out_of_bounds": ("object that reaches more than a pixel outside its image", "clipped to the image"),
    "box_without_mask": ("object with a box and no mask", "trains the box only"),
    "mask_without_box": ("object with a mask and no usable box", "the box is taken from the mask"),
    "empty_object": ("object without any area", "dropped"),
    "box_mask_disagree": ("box and mask overlap by less than half", "both are used as they are"),
    "crowd": ("crowd region (iscrowd)", "not a target; its category is not asked as a negative on that image"),
    "many_objects": ("image with more objects of one category than the model has queries", "kept; recall is limited"),
}


@dataclass
class Issue:
    """One kind of fault with its count, a few examples and what is done about it."""

    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def description(self) -> str:
        return KINDS[self.kind][0]

    @property
    def action(self) -> str:
        return KINDS[self.kind][1]

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "count": self.count,
            "description": self.description,
            "action": self.action,
            "examples": list(self.examples),
        }

    def __str__(self) -> str:
        return f"{self.count} x {self.description}: {self.action} (e.g. {'; '.join(self.examples)})"


class IssueLog:
    """Counts faults by kind and keeps the first few examples of each."""

    def __init__(self) -> None:
        self._issues: dict[str, Issue] = {}

    def add(self, kind: str, example: str) -> None:
        assert kind in KINDS, kind
        issue = self._issues.setdefault(kind, Issue(kind))
        issue.count += 1
        if len(issue.examples) < MAX_EXAMPLES:
            issue.examples.append(example)

    def count(self, kind: str) -> int:
        return self._issues[kind].count if kind in self._issues else 0

    def examples(self, kind: str) -> list[str]:
        return list(self._issues[kind].examples) if kind in self._issues else []

    def __iter__(self) -> Iterator[Issue]:
        return iter(self._issues.values())

    def __len__(self) -> int:
        return len(self._issues)
