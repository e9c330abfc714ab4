"""Faults of data sets: every kind with what is done about it, and a log that counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MAX_EXAMPLES = 3

# kind -> (what it is, what is done about it)
_COCO_KINDS = {
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
_CONVERSION_KINDS = {
    "broken_source_image": ("image that cannot be read", "left out"),
    "unlabelled_image": ("image without a label file", "left out: it may show objects"),
    "unlabelled_negative": ("image without a label file", "kept as an image without objects"),
    "unlabelled_split": ("split without any label file", "left out"),
    "label_without_image": ("label file without an image", "left out"),
    "turned_image": ("image that its EXIF data mirrors or turns upside down", "labels are taken for the stored pixels"),
    "renamed_image": ("image with the same name as another one of its split", "renamed"),
    "repeated_label": ("label listed twice", "the copy is dropped"),
    "label_size_mismatch": (
        "label file with another image size than its image",
        "coordinates refer to the label's size",
    ),
    "difficult": ("object marked as difficult", "kept as an ordinary object"),
    "skipped_shape": ("shape that encloses nothing (point, line) or is of an unknown type", "dropped"),
    "mask_resized": ("mask of another size than its image", "scaled to the image, nearest pixel"),
    "grey_mask": ("mask of one category with values between black and white", "cut at one half"),
    "colour_mask": ("mask in colours", "read as grey"),
    "void_pixels": ("mask with pixels of value 255 (void)", "taken as background"),
    "parent_category": ("unused row that only names a group of categories", "not a category"),
    "dropped_crowd": ("crowd region (iscrowd), which the format cannot express", "left out"),
    "hole": ("hole in a mask, which a YOLO polygon cannot express", "filled"),
    "box_as_mask": ("object with a box and no mask, in a format of masks", "written as a rectangle"),
    "covered": ("object of which smaller ones cover more than a tenth in a mask image", "that part is theirs"),
    "hidden": ("object that smaller ones cover completely in a mask image", "lost"),
    "unmatched_name": ("image name in which --group-by finds nothing", "grouped by its content alone"),
}
KINDS = _COCO_KINDS | _CONVERSION_KINDS


@dataclass
class Fault:
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


class FaultLog:
    """Counts faults by kind and keeps the first few examples of each."""

    def __init__(self) -> None:
        self._faults: dict[str, Fault] = {}

    def add(self, kind: str, *examples: str, count: int = 1) -> None:
        assert kind in KINDS, kind
        fault = self._faults.setdefault(kind, Fault(kind))
        fault.count += count
        fault.examples = [*fault.examples, *examples][:MAX_EXAMPLES]

    def include(self, faults: Iterable[Fault]) -> None:
        """Add faults that another log has counted."""
        for fault in faults:
            self.add(fault.kind, *fault.examples, count=fault.count)

    def count(self, kind: str) -> int:
        return self._faults[kind].count if kind in self._faults else 0

    def examples(self, kind: str) -> list[str]:
        return list(self._faults[kind].examples) if kind in self._faults else []

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults.values())

    def __len__(self) -> int:
        return len(self._faults)
