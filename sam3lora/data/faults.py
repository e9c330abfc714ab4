"""Faults of data sets: every kind with what is done about it, and a log that counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MAX_EXAMPLES = 3

LEVELS = LOST, CHANGED, NOTE = "lost", "changed", "note"
"""Levels: images or labels are left out; something is read in another way than it is written; good to know."""

# kind -> (what it is, what is done about it, level)
_COCO_KINDS = {
    "missing_image": ("image listed in the annotation file but not found", "left out", LOST),
    "unreadable_image": (
        "image that cannot be decoded",
        "left out (training.on_bad_image: skip) or stops the run",
        LOST,
    ),
    "skipped_image": ("image that was to be measured and could not be read", "left out", LOST),
    "duplicate_image_id": ("image listed twice with the same id", "read once", CHANGED),
    "ambiguous_image_id": ("image id used for several files", "all of them are left out", LOST),
    "duplicate_file_name": (
        "file listed under several image ids",
        "one image with the labels of all listings",
        CHANGED,
    ),
    "other_unicode_form": ("file name in another Unicode form than the file has", "found", NOTE),
    "unclear_image": (
        "image with a label that cannot be used",
        "left out with all its labels: it can serve neither as an example nor as a counterexample",
        LOST,
    ),
    "bad_image_entry": ("image entry without usable id or file_name", "left out", LOST),
    "size_mismatch": (
        "image size differs from the annotation file",
        "the real size is used; coordinates are taken relative to the size in the file",
        CHANGED,
    ),
    "no_size": ("image entry without a usable width and height", "the size is read from the image", NOTE),
    "unused_category": ("category row without any annotation", "not a prompt and not a negative", NOTE),
    "duplicate_category_name": ("several category ids with one name", "treated as one category", NOTE),
    "unprintable_name": (
        "category name with line ends or characters that cannot be shown",
        "they become spaces",
        CHANGED,
    ),
    "ambiguous_category_id": ("category id used for several names", "annotations of that id are dropped", LOST),
    "unknown_category": ("annotation of a category that is not listed, or whose id is ambiguous", "dropped", LOST),
    "unknown_image": ("annotation of an image that is not listed", "dropped", LOST),
    "duplicate_annotation": ("annotation listed twice", "the copy is dropped", CHANGED),
    "duplicate_annotation_id": (
        "annotation id used by two different objects",
        "both kept, the second gets a new id",
        CHANGED,
    ),
    "named_by_file": ("annotation that names its image by the file instead of the id", "read", CHANGED),
    "bad_annotation": ("annotation that is not an object, or names no image", "dropped", LOST),
    "unreadable_label": ("annotation whose box and mask cannot be read", "dropped", LOST),
    "shares": (
        "label in shares of the image, not pixels",
        "dropped: multiply boxes and masks by the width and height of the image",
        LOST,
    ),
    "left_out_label": ("label of an image that is left out", "left out with it", LOST),
    "bad_flag": ("iscrowd that is neither 0 nor 1", "taken as 0", CHANGED),
    "all_crowd": ("file whose labels are all crowd regions (iscrowd)", "there is no object to find in it", LOST),
    "short_polygon": ("polygon part with fewer than 3 points", "the part is dropped", LOST),
    "bad_polygon": (
        "polygon part with an odd number of values, or with values that cannot be pixels",
        "the part is dropped",
        LOST,
    ),
    "bad_rle": (
        "run-length mask that is damaged or does not fill its size",
        "the mask is dropped, the box is kept",
        LOST,
    ),
    "rle_size_mismatch": ("run-length mask of another size than its image", "the mask is rescaled", CHANGED),
    "out_of_bounds": ("object that reaches more than a pixel outside its image", "clipped to the image", CHANGED),
    "box_without_mask": ("object with a box and no mask", "trains the box only", NOTE),
    "mask_without_box": ("object with a mask and no usable box", "the box is taken from the mask", NOTE),
    "empty_object": ("object without any area", "dropped", LOST),
    "box_mask_disagree": ("box and mask overlap by less than half", "both are used as they are", CHANGED),
    "crowd": ("crowd region (iscrowd)", "no target; its category (unless void) is no negative on that image", NOTE),
    "many_objects": (
        "image with more objects of one category than the model has queries",
        "kept; recall is limited",
        CHANGED,
    ),
}
_RESULT_KINDS = {
    "bad_result": ("result that is not an object, or names no image or no category", "left out", LOST),
    "bad_score": ("result whose score is not a number", "left out", LOST),
    "odd_score": ("result with a score below 0 or above 1", "used as it is", CHANGED),
    "result_without_mask": ("result without a mask of any pixel in the image", "left out", LOST),
    "result_of_unclear_image": ("result of an image that is left out", "left out", LOST),
}
_CONVERSION_KINDS = {
    "broken_source_image": ("image that cannot be read", "left out", LOST),
    "unlabelled_image": ("image without a label file", "left out: it may show objects", LOST),
    "unlabelled_negative": ("image without a label file", "kept as an image without objects", NOTE),
    "unlisted_image": ("image that no list of a split names", "left out", LOST),
    "missing_split": ("split that data.yaml names but that is not there", "left out", NOTE),
    "repeated_split": ("split that data.yaml names with the images of another one", "left out", NOTE),
    "incomplete_image": (
        "image that would pass for one without a category because labels were lost",
        "left out",
        LOST,
    ),
    "shared_image": ("image with several label files", "their labels are joined", CHANGED),
    "renamed_source_image": (
        "label file that names an image which is not there",
        "the image beside it with the label file's name is used",
        CHANGED,
    ),
    "unlabelled_split": ("split without any label file", "left out", LOST),
    "label_without_image": ("label file without an image", "left out", LOST),
    "turned_image": (
        "image that its EXIF data mirrors or turns upside down",
        "labels are taken for the stored pixels",
        CHANGED,
    ),
    "renamed_image": ("image with the name of another one of its split, or a name that is no text", "renamed", CHANGED),
    "repeated_label": ("label listed twice", "the copy is dropped", CHANGED),
    "label_size_mismatch": (
        "label file with another image size than its image",
        "coordinates refer to the label's size",
        CHANGED,
    ),
    "difficult": ("object marked as difficult", "kept as an ordinary object", NOTE),
    "skipped_shape": ("shape that encloses nothing (point, line) or is of an unknown type", "dropped", LOST),
    "mask_resized": ("mask of another size than its image", "scaled to the image, nearest pixel", CHANGED),
    "grey_mask": ("mask of one category with values between black and white", "cut at one half", CHANGED),
    "colour_mask": ("mask in colours", "read as grey", CHANGED),
    "mixed_white": (
        "mask of 0 and 255 among masks of 0 and 1",
        "255 is the category too; if it is void, name the background first (--names background NAME)",
        CHANGED,
    ),
    "void_pixels": ("image with void pixels, which the format cannot express", "taken as background", CHANGED),
    "parent_category": ("unused row that only names a group of categories", "not a category", NOTE),
    "dropped_crowd": ("crowd region (iscrowd), which the format cannot express", "left out", LOST),
    "hole": ("hole in a mask, which a YOLO polygon cannot express", "filled", CHANGED),
    "box_as_mask": ("object with a box and no mask, in a format of masks", "written as a rectangle", CHANGED),
    "covered": ("object of which smaller ones cover more than a tenth in a mask image", "that part is theirs", CHANGED),
    "hidden": ("object that smaller ones cover completely in a mask image", "lost", LOST),
    "unmatched_name": ("image name in which --group-by finds nothing", "grouped by its content alone", CHANGED),
}
KINDS = _COCO_KINDS | _RESULT_KINDS | _CONVERSION_KINDS

# Kinds of which each count is a whole image, or a whole label (in a predictions file: a result), that is left out. The
# other kinds of level LOST count parts: a polygon of a mask, a mask of an object that keeps its box, a file.
IMAGES_LEFT_OUT = frozenset(
    (
        "missing_image",
        "unreadable_image",
        "skipped_image",
        "ambiguous_image_id",
        "unclear_image",
        "bad_image_entry",
        "broken_source_image",
        "unlabelled_image",
        "unlisted_image",
        "incomplete_image",
    )
)
LABELS_LEFT_OUT = frozenset(
    (
        "unknown_category",
        "unknown_image",
        "bad_annotation",
        "unreadable_label",
        "shares",
        "left_out_label",
        "empty_object",
        "skipped_shape",
        "dropped_crowd",
        "hidden",
        *(kind for kind, (_, _, level) in _RESULT_KINDS.items() if level == LOST),
    )
)


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

    @property
    def level(self) -> str:
        return KINDS[self.kind][2]

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "level": self.level,
            "count": self.count,
            "description": self.description,
            "action": self.action,
            "examples": list(self.examples),
        }

    def __str__(self) -> str:
        examples = f" (e.g. {'; '.join(self.examples)})" if self.examples else ""
        return f"{self.count} x {self.description}: {self.action}{examples}"


def printable(text: str) -> str:
    """Names from files may hold what moves a terminal's cursor, or cannot be written at all."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class FaultLog:
    """Counts faults by kind and keeps the first few examples of each."""

    def __init__(self) -> None:
        self._faults: dict[str, Fault] = {}

    def add(self, kind: str, *examples: str, count: int = 1) -> None:
        assert kind in KINDS, kind
        fault = self._faults.setdefault(kind, Fault(kind))
        fault.count += count
        shown = map(printable, examples[: MAX_EXAMPLES - len(fault.examples)])
        fault.examples = [*fault.examples, *shown]

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
