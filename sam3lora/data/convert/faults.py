"""What a conversion repairs, leaves out or cannot express, counted by kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from sam3lora.data.faults import MAX_EXAMPLES, Issue

# kind -> (what it is, what is done about it)
KINDS: dict[str, tuple[str, str]] = {
    "unreadable_image": ("image that cannot be read", "left out"),
    "unlabelled_image": ("image without a label file", "left out: it may show objects"),
    "unlabelled_negative": ("image without a label file", "kept as an image without objects"),
    "unlabelled_split": ("split without any label file", "left out"),
    "label_without_image": ("label file without an image", "left out"),
    "turned_image": ("image that its EXIF data mirrors or turns upside down", "labels are taken for the stored pixels"),
    "renamed_image": ("image whose name another one of its split has", "renamed"),
    "empty_object": ("object without any area", "dropped"),
    "repeated_label": ("label listed twice", "the copy is dropped"),
    "outside": ("object that reaches more than a pixel outside its image", "clipped to the image"),
    "size_mismatch": ("label file with another image size than its image", "coordinates refer to the label's size"),
    "difficult": ("object marked as difficult", "kept as an ordinary object"),
    "skipped_shape": ("shape that encloses nothing (point, line) or is of an unknown type", "dropped"),
    "mask_resized": ("mask of another size than its image", "scaled to the image, nearest pixel"),
    "grey_mask": ("mask of one category with values between black and white", "cut at one half"),
    "colour_mask": ("mask in colours", "read as grey"),
    "void_pixels": ("mask with pixels of value 255 (void)", "taken as background"),
    "parent_category": ("unused row that only names a group of categories", "not a category"),
    "crowd": ("crowd region (iscrowd), which the format cannot express", "left out"),
    "hole": ("hole in a mask, which a YOLO polygon cannot express", "filled"),
    "box_as_mask": ("object with a box and no mask, in a format of masks", "written as a rectangle"),
    "covered": ("object of which smaller ones cover more than a tenth in a mask image", "that part is theirs"),
    "hidden": ("object that smaller ones cover wholly in a mask image", "lost"),
    "unmatched_name": ("image name in which --group-by finds nothing", "grouped by its content alone"),
}


@dataclass
class Fault:
    """One kind of fault with its count, a few examples and what was done about it."""

    description: str
    action: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class FaultLog:
    """Counts faults by kind and keeps the first few examples of each."""

    def __init__(self) -> None:
        self._faults: dict[tuple[str, str], Fault] = {}

    def add(self, kind: str, example: str) -> None:
        self._count(*KINDS[kind], 1, [example])

    def include(self, issues: Iterable[Issue]) -> None:
        """Take over what reading a COCO folder has counted."""
        for issue in issues:
            self._count(issue.description, issue.action, issue.count, issue.examples)

    def count(self, kind: str) -> int:
        fault = self._faults.get(KINDS[kind])
        return fault.count if fault else 0

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults.values())

    def _count(self, description: str, action: str, count: int, examples: list[str]) -> None:
        fault = self._faults.setdefault((description, action), Fault(description, action))
        fault.count += count
        fault.examples = [*fault.examples, *examples][:MAX_EXAMPLES]
