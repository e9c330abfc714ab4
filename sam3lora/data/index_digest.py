"""Short digests that tell whether two indexes hold the same images with the same labels."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from sam3lora.data.coco import CocoIndex

_IMAGES = ("image_id", "file_name", "width", "height")
_DIGITS = 12  # of a digest, in base 16


def index_digest(index: CocoIndex) -> dict[str, str]:
    """Number and digest of the images, and of their labels, in their order; neither pixels nor the folder count.

    The 118,000 images of COCO take 0.4 s.

    >>> from sam3lora.data.label_table import SCHEMA
    >>> index_digest(CocoIndex(SCHEMA.empty_table(), {}))
    {'images': '0 [digest c84e14c19a6c]', 'labels': '0 [digest abf55155e785]'}
    """
    num_labels = pc.sum(pc.list_value_length(index.table["annotations"])).as_py() or 0
    return {
        "images": f"{len(index)} [digest {_digest(index.table.select(_IMAGES))}]",
        "labels": f"{num_labels} [digest {_digest(index.table.select(['annotations']))}]",
    }


def _digest(table: pa.Table) -> str:
    sink = _HashingFile()
    with pa.ipc.new_stream(pa.PythonFile(cast(Any, sink), "w"), table.schema) as stream:
        stream.write_table(table)
    return sink.hash.hexdigest()[:_DIGITS]


class _HashingFile:
    """A file that keeps only the hash of what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.hash = hashlib.blake2b()

    def write(self, data: bytes) -> None:
        self.hash.update(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...
