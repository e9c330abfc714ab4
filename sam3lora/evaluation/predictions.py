"""A model's COCO results on a split, kept in a file because masks of large splits do not fit in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3lora.errors import UserError
from sam3lora.files import whole_file

_IN_MEMORY_BYTES = 64 * 2**20  # a file is made only if there is more


class EncodedResults(NamedTuple):
    """The results of one image: how many, and their JSON text without the brackets of the list."""

    num_results: int
    text: bytes


def encode_results(results: Sequence[Mapping[str, Any]], image_ids: Sequence[int]) -> dict[int, EncodedResults]:
    """The results of each of these images."""
    by_image: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in image_ids}
    for result in results:
        by_image[result["image_id"]].append(result)
    return {
        image_id: EncodedResults(len(of_image), json.dumps(of_image, ensure_ascii=False)[1:-1].encode())
        for image_id, of_image in by_image.items()
    }


class Predictions:
    """COCO results by image, added in any order and read in the order of the images.

    They lie in a temporary file, which goes away with the process; up to 64 MiB stay in memory.
    """

    def __init__(self, image_ids: Sequence[int]) -> None:
        self._image_ids = list(image_ids)
        self._places: dict[int, tuple[int, int]] = {}
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115
        self._count = 0

    def add(self, encoded: Mapping[int, EncodedResults]) -> None:
        """Keep the results of some images, each of which comes once; UserError if there is no room on the disk."""
        try:
            end = self._file.seek(0, 2)
            for image_id, (num_results, text) in encoded.items():
                self._count += num_results
                self._places[image_id] = (end, len(text))
                end += self._file.write(text)
        except OSError as error:
            raise UserError(
                f"cannot keep the results in {tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a folder with "
                "more room, or measure fewer detections (--lowest-score)"
            ) from None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for image_id in self._image_ids:
            yield from self.of_image(image_id)

    def of_image(self, image_id: int) -> list[dict[str, Any]]:
        return json.loads(b"[%b]" % self._text(image_id))

    def write(
        self, path: Path, image_ids: Mapping[int, Any] | None = None, category_ids: Mapping[int, Any] | None = None
    ) -> None:
        """Write `predictions.json`, a list of COCO results.

        The maps hold ids that the annotation file writes in another way than the index numbers them.
        """
        with whole_file(path) as scratch, scratch.open("wb") as file:
            file.write(b"[")
            separator = b""
            for image_id in self._image_ids:
                text = self._text(image_id)
                if text and (image_ids or category_ids):
                    text = self._text_with_ids(image_id, image_ids or {}, category_ids or {})
                if text:
                    file.write(separator + text)
                    separator = b", "
            file.write(b"]\n")

    def _text_with_ids(self, image_id: int, image_ids: Mapping[int, Any], category_ids: Mapping[int, Any]) -> bytes:
        results = self.of_image(image_id)
        for result in results:
            result["image_id"] = image_ids.get(image_id, image_id)
            result["category_id"] = category_ids.get(result["category_id"], result["category_id"])
        return json.dumps(results, ensure_ascii=False)[1:-1].encode()

    def _text(self, image_id: int) -> bytes:
        start, size = self._places.get(image_id, (0, 0))
        self._file.seek(start)
        return self._file.read(size)
