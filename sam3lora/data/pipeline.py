"""Decoded batches in the order of a plan: on Ray Data tasks, or in the calling process.

Each worker builds its own small dataset, whose rows are batches of the plan. A task decodes a batch as late as
possible and yields it whole. A dataset spans epochs, so that the first batches of an epoch are read while the last ones
of the epoch before are trained on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import pyarrow as pa

from sam3lora.data.batch import Batch
from sam3lora.data.coco import read_record
from sam3lora.data.images import ImageError
from sam3lora.data.plan import BatchPlan
from sam3lora.data.sample import DecodeSettings, decode_record

_BATCHES_PER_DATASET = 1024  # starting a dataset takes time and memory for each of its tasks
_BATCHES_PER_TASK = 4  # batches share Ray Data's cost of a task, some 10 ms, and leave the task one by one
_CONTEXT_LOCK = threading.Lock()


def decode_batch(table: pa.Table, plan: BatchPlan, settings: DecodeSettings) -> Batch:
    """Decode the images of one batch. It may hold fewer images than planned, also none: `skipped` lists the others.

    Raises:
        ImageError: A bad image with `on_bad_image` "stop".
    """
    parts = [decode_record(read_record(table, row), settings, plan.epoch) for row in plan.rows]
    return Batch.join(parts, epoch=plan.epoch, step=plan.step)


def iterate_batches(table: pa.Table, plans: Iterable[BatchPlan], settings: DecodeSettings) -> Iterator[Batch]:
    """The batches of `stream_batches`, decoded in this process without Ray and without prefetching."""
    for plan in plans:
        yield decode_batch(table, BatchPlan(*plan), settings)


@dataclass(frozen=True)
class SharedTable:
    """A table for several calls of `stream_batches`: it is put into Ray's object store once, when it is first read."""

    table: pa.Table

    @functools.cached_property
    def ref(self) -> Any:
        import ray

        return ray.put(self.table)


def stream_batches(
    table: pa.Table | SharedTable,
    plans: Iterable[BatchPlan],
    settings: DecodeSettings,
    *,
    num_cpus: int = 1,
    prefetch_batches: int = 2,
    other_nodes: Collection[str] = (),
) -> Iterator[Batch]:
    """Decode batches on Ray Data tasks, ahead of their use and exactly in the order of the plan.

    Ray must be running. The tasks run on the caller's node and reserve no CPU, because tasks that did would wait
    forever where training workers have reserved all. The caller reserves CPUs for them together with its own. A node
    that Ray drains takes no tasks any more: they go on at the other nodes.

    Args:
        table: `CocoIndex.table`.
        plans: From `plan_run` or `plan_validation`; read some batches ahead of their use, never as a whole.
        num_cpus: Decoding tasks at a time, each busy on one CPU.
        prefetch_batches: Batches fetched to this process ahead of use.
        other_nodes: Ids of nodes that have the images too.

    Raises:
        ImageError: A bad image with `on_bad_image` "stop", when its batch is reached.
    """
    import ray

    shared = table if isinstance(table, SharedTable) else SharedTable(table)
    remaining = iter(plans)
    while plan_rows := [BatchPlan(*plan)._asdict() for plan in islice(remaining, _BATCHES_PER_DATASET)]:
        decode = _decode_row(shared.ref, settings)
        here, others = _on_nodes(ray.get_runtime_context().get_node_id()), _on_nodes(*other_nodes)
        # The rows are made here: a reading task would ask for a CPU.
        with _data_context():
            planned = ray.data.from_items(plan_rows, override_num_blocks=-(-len(plan_rows) // _BATCHES_PER_TASK))
            tasks = ray.data.TaskPoolStrategy(size=num_cpus)
            elsewhere = [{"label_selector": others}] if other_nodes else None
            dataset = planned.map(decode, num_cpus=0, label_selector=here, fallback_strategy=elsewhere, compute=tasks)
        batches = dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=prefetch_batches)
        block: Any
        for block in batches:
            batch = pickle.loads(block.column("batch")[0].as_buffer())  # noqa: S301  written by our own task
            if isinstance(batch, ImageError):
                raise batch
            yield batch


def warm_up_reading() -> None:
    """Start what `stream_batches` needs on this node, while the caller has other things to do: some seconds.

    These are two processes of Ray Data, and one for a task, which imports the modules for decoding.
    """
    import ray

    here = _on_nodes(ray.get_runtime_context().get_node_id())
    with contextlib.suppress(Exception):  # whatever it is, reading itself will tell
        with _data_context():
            one = ray.data.from_items([BatchPlan(0, 0, [])._asdict()])
            dataset = one.map(_import_decoding, num_cpus=0, label_selector=here)
        dataset.take_all()


def _on_nodes(*ids: str) -> dict[str, str]:
    """What Ray calls a label selector: any of these nodes."""
    return {"ray.io/node-id": f"in({','.join(ids)})"}


def _import_decoding(row: dict[str, Any]) -> dict[str, Any]:
    return {"batch": pickle.dumps(row)}  # finding this function has imported the module


def _decode_row(table_ref: Any, settings: DecodeSettings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def decode(row: dict[str, Any]) -> dict[str, Any]:
        import ray

        cv2.setNumThreads(1)  # each task has one CPU
        plan = BatchPlan(row["epoch"], row["step"], [int(position) for position in row["rows"]])
        table = ray.get(table_ref)
        try:
            result: Batch | ImageError = decode_batch(table, plan, settings)
        except ImageError as error:  # raised where the batch is used, without Ray's wrapping
            result = error
        return {"batch": pickle.dumps(result, protocol=5)}

    return decode


@contextlib.contextmanager
def _data_context() -> Iterator[None]:
    """Settings that a new dataset copies: order of the plan, no progress output, one batch a block, bounded memory.

    They are those of the whole process, so one thread at a time has them.
    """
    from ray.data import DataContext

    for name in ("progress", "execution.streaming_executor"):  # each prints one uninformative line a run
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)
    with _CONTEXT_LOCK:
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = 1  # every batch is a block of its own
        context.target_min_block_size = 1
        with DataContext.current(context):
            yield
