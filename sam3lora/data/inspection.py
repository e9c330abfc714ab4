"""Looking at every image file and every mask of an index, a piece of the table at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import pyarrow as pa

from sam3lora.cpus import usable_cpus
from sam3lora.data.coco_limits import SIZE_LIMITS
from sam3lora.data.images import ImageError, check_image
from sam3lora.data.masks import mask_area
from sam3lora.errors import RunFailed

_T = TypeVar("_T")

_ROWS, _PIECES_AHEAD = 128, 32
_ROWS_WORTH_PROCESSES = 2000  # whose inspection takes longer than starting processes


@dataclass(frozen=True)
class InspectedImage:
    """A file as it was found: the SHA-256 of its content, and the kind and the details of its fault, if it has one."""

    file_name: str
    digest: str = ""
    fault: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Inspected:
    """Some rows of a table: their image files in order, and how many of their objects are small, medium and large."""

    images: list[InspectedImage]
    num_of_size: tuple[int, int, int]


def inspect_table(table: pa.Table, *, num_processes: int = 0) -> Generator[Inspected]:
    """Everything about the rows of an index table, in their order; see `map_pieces`."""
    return map_pieces(table, _inspect_records, num_processes=num_processes)


def map_pieces(
    table: pa.Table, look_at: Callable[[list[dict[str, Any]]], _T], *, num_processes: int = 0
) -> Generator[_T]:
    """The results of a function for the records of each piece, in the order of the rows of an index table.

    Only some pieces are held at a time.

    Args:
        table: `CocoIndex.table`.
        look_at: A function that can be pickled.
        num_processes: Processes that share the work of a large table; 0 works on threads. As everywhere in Python, a
            script starts processes under `if __name__ == "__main__"` only.

    Raises:
        RunFailed: One of the processes was ended from outside.
    """
    pool: Executor
    if num_processes and table.num_rows >= _ROWS_WORTH_PROCESSES:
        pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_start_process)
    else:
        pool = ThreadPoolExecutor(min(8, usable_cpus()))
    pending: deque[Future[_T]] = deque()
    try:
        for start in range(0, table.num_rows, _ROWS):
            pending.append(pool.submit(_of_piece, look_at, _to_bytes(table.slice(start, _ROWS))))
            if len(pending) >= _PIECES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunFailed("a process that reads images was ended, perhaps for want of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one stops the others
    cv2.setNumThreads(1)


def _to_bytes(table: pa.Table) -> bytes:
    """A slice of a table alone: pickled, it would take the whole table's memory along."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue().to_pybytes()


def _of_piece(look_at: Callable[[list[dict[str, Any]]], _T], piece: bytes) -> _T:
    return look_at(pa.ipc.open_stream(piece).read_all().to_pylist())


def _inspect_records(records: list[dict[str, Any]]) -> Inspected:
    images, counts = [], [0, 0, 0]
    for record in records:
        images.append(_inspect_image(record))
        for annotation in record["annotations"]:
            if not annotation["iscrowd"]:
                counts[_size_of(annotation, (record["height"], record["width"]))] += 1
    return Inspected(images, (counts[0], counts[1], counts[2]))


def _size_of(annotation: dict[str, Any], size_hw: tuple[int, int]) -> int:
    """0, 1, 2 for small, medium, large: by the mask's area, or the box's of an object without a mask."""
    area = mask_area(annotation["segmentation"], size_hw)
    area = area or annotation["bbox_xywh"][2] * annotation["bbox_xywh"][3]
    return sum(area >= limit for limit in SIZE_LIMITS)


def _inspect_image(record: dict[str, Any]) -> InspectedImage:
    name, size_hw = record["file_name"], (record["height"], record["width"])
    digest = ""
    try:
        data = Path(record["path"]).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        height, width = check_image(data, size_hw)
    except (ImageError, OSError) as error:
        return InspectedImage(name, digest, "unreadable_image", f"{name}: {error}")
    if (height, width) != size_hw:
        detail = f"{name}: file {width} x {height}, annotations {size_hw[1]} x {size_hw[0]}"
        return InspectedImage(name, digest, "size_mismatch", detail)
    return InspectedImage(name, digest)
