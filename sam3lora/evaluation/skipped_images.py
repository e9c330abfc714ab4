"""Images of a split that cannot be read: an evaluation stops before it begins, or names them and measures the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sam3lora.config.training import OnBadImage
from sam3lora.data.bad_images import WITHOUT_THEM, SkippedImage, find_unreadable
from sam3lora.data.coco import CocoIndex
from sam3lora.data.fault_report import SplitFault, split_faults
from sam3lora.data.faults import MAX_EXAMPLES, FaultLog, printable
from sam3lora.data.images import ImageError
from sam3lora.data.index_columns import object_columns
from sam3lora.errors import UserError


class SkippedImages:
    """Counts the images of an index that cannot be read.

    Args:
        index: A whole split.
        num_samples: The first so many of its images are measured; None for all.
    """

    def __init__(self, index: CocoIndex, num_samples: int | None = None) -> None:
        self._split, self._index = index, index.first(num_samples)
        self._images: dict[int, SkippedImage] = {}

    def look_ahead(self, on_bad_image: OnBadImage, *, only_labelled: bool = False) -> CocoIndex:
        """Find the damaged images before a model is asked, of all or of those with a label; returns `readable`.

        Raises:
            ImageError: There are some and `on_bad_image` is "stop", or all of them are.
        """
        table = self._index.table.select(["image_id", "path", "height", "width"])
        if only_labelled:
            table = table.filter(object_columns(self._index.table).count_per_image() > 0)
        self.add(unreadable_ahead(table.to_pylist(), self._index.source, on_bad_image))
        self.check_some_read(table.num_rows - len(self._images))
        return self.readable()

    def add(self, images: Iterable[SkippedImage]) -> None:
        """Count further ones, which workers could not read."""
        self._images |= {image.image_id: image for image in images}

    def readable(self) -> CocoIndex:
        """The images to measure without them, and without the categories that only they show in the whole split.

        Raises:
            ImageError: None is left.
        """
        if not self._images:
            return self._index
        rows = np.flatnonzero(~self._is_skipped(self._index)).tolist()
        self.check_some_read(len(rows))
        in_use = object_columns(self._split.table.filter(~self._is_skipped(self._split))).count_per_category()
        names = {id_: name for id_, name in self._index.category_names.items() if name in in_use}
        return dataclasses.replace(self._index.select_rows(rows), category_names=names)

    def _is_skipped(self, index: CocoIndex) -> np.ndarray:
        return np.isin(index.table.column("image_id").to_numpy(), list(self._images))

    def check_some_read(self, number: int) -> None:
        """Raise ImageError if images were skipped and `number`, of what was measured of the others, is 0."""
        if self._images and not number:
            raise none_readable(self._index.source, list(self._images.values()))

    def listed(self) -> list[dict[str, Any]]:
        """JSON values of each: `image_id` as the annotation file writes it, `path` and `reason`."""
        return [
            image._asdict() | {"image_id": self._index.written_id(image.image_id)}
            for _, image in sorted(self._images.items())
        ]

    def faults(self, split: str, of_file: Sequence[SplitFault]) -> Sequence[SplitFault]:
        """The faults of the split's annotation file, with these images and their labels as further ones."""
        if not self._images:
            return of_file
        log = FaultLog()
        log.include(self._index.faults)
        for image in self.listed():
            log.add("skipped_image", _named(image))
        skipped = self._index.table.filter(self._is_skipped(self._index))
        if num_labels := sum(map(len, skipped.column("annotations").to_pylist())):
            log.add("left_out_label", count=num_labels)
        return split_faults(split, log)


def unreadable_ahead(records: Sequence[Mapping[str, Any]], source: str, on_bad_image: OnBadImage) -> list[SkippedImage]:
    """The images that `find_unreadable` finds damaged.

    Raises:
        ImageError: There are some and `on_bad_image` is "stop".
    """
    found = find_unreadable(records)
    if found and on_bad_image == "stop":
        reasons = "; ".join(f"{image.path}: {image.reason}" for image in found[:MAX_EXAMPLES])
        raise ImageError(
            f"{source}: {len(found)} of {len(records)} images cannot be read, e.g. {reasons}. Repair them, take them "
            f"out of the file, or {WITHOUT_THEM}"
        )
    return found


def none_readable(source: str, images: Sequence[SkippedImage]) -> ImageError:
    """What to raise where no image could be read."""
    return ImageError(
        f"{source}: none of the {len(images)} images to measure could be read, the first is {images[0].path}: "
        f"{images[0].reason}"
    )


def skipped_note(images: Sequence[Mapping[str, Any]], num_measured: int, what: str = "images") -> str:
    """The `listed` images in a sentence for a terminal, with the number of those that were measured.

    `what` names the plural.
    """
    if not images:
        return ""
    named = "; ".join(map(_named, images[:MAX_EXAMPLES]))
    more = ", and so on" if len(images) > MAX_EXAMPLES else ""
    return f"{len(images)} of {num_measured + len(images)} {what} could not be read and are not measured: {named}{more}"


def _named(image: Mapping[str, Any]) -> str:
    return printable(f"image {image['image_id']} {image['path']}: {image['reason']}")


class Measured(Protocol):
    """The metrics of a model on a split."""

    @property
    def label(self) -> str: ...
    @property
    def skipped_images(self) -> Sequence[Mapping[str, Any]]: ...


def check_same_images(results: Sequence[Measured]) -> None:
    """Raise UserError if models that were measured one after the other could not read the same images."""
    ids = [{image["image_id"] for image in one.skipped_images} for one in results]
    for one, skipped in zip(results, ids, strict=True):
        if differing := sorted(map(str, skipped ^ ids[0])):
            raise UserError(
                f"image {differing[0]} could be read for one of the models {results[0].label} and {one.label} and not "
                "for the other, so they cannot be compared: measure them again when the images stay as they are"
            )
