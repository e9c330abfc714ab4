"""Batches of decoded samples, in the order of a plan: on Ray Data tasks, or in the calling process.

Each worker builds its own small dataset: its rows are nothing but positions in the plan, and a batch is decoded as late
as possible, by a task that yields it whole. A dataset goes on from epoch to epoch, so that the next epoch's first
batches are read while this one's last are trained on.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from sam3lora.data.coco import read_record
from sam3lora.data.images import ImageError
from sam3lora.data.plan import BatchPlan
from sam3lora.data.sample import DecodeSettings, decode_record

BatchDict = dict[str, Any]

_BATCHES_PER_DATASET = 1024  # the start of a dataset takes time and memory for each of its tasks
_BATCHES_PER_TASK = 4  # Ray Data's cost of a task, some 10 ms, is shared; batches leave the task one by one


def decode_batch(table: pa.Table, plan: BatchPlan, settings: DecodeSettings) -> BatchDict:
    """Decode the images of one batch and pack their queries and targets.

    Returns:
        `epoch`, `step`; per image `image_ids` int64 (I,), `paths`, `original_sizes_hw` int64 (I, 2), `placements`,
        `feature_keys`; `images` uint8 (N, S, S, 3) of those that carry pixels, and `image_rows` int64 (N,), which of
        the I they are; per query `query_image` int64 (B,), position among the I, `prompts`, `categories`,
        `is_positive` (B,), `num_targets` (B,); per target as in `place_targets`, with `mask_size`; `num_limited`; and
        `skipped`, (image id, path, reason) of the images left out. I may be smaller than planned, also 0, and so may
        B.

    Raises:
        ImageError: A bad image with `on_bad_image` "stop".
    """
    samples, skipped = [], []
    for row in plan.rows:
        record = read_record(table, row)
        sample = decode_record(record, settings, plan.epoch)
        if isinstance(sample, ImageError):
            skipped.append((record["image_id"], record["path"], str(sample)))
        else:
            samples.append(sample)
    return {"epoch": plan.epoch, "step": plan.step, **_pack(samples, settings), "skipped": skipped}


def iterate_batches(table: pa.Table, plans: Iterable[BatchPlan], settings: DecodeSettings) -> Iterator[BatchDict]:
    """The batches of `stream_batches`, decoded in this process: no Ray, no prefetching."""
    for plan in plans:
        yield decode_batch(table, BatchPlan(*plan), settings)


def stream_batches(
    table: pa.Table,
    plans: Iterable[BatchPlan],
    settings: DecodeSettings,
    *,
    num_cpus: int = 1,
    prefetch_batches: int = 2,
) -> Iterator[BatchDict]:
    """Decode batches on Ray Data tasks, ahead of their use and exactly in the order of the plan.

    A Ray must be running. The tasks run on the caller's node and ask for no CPU: tasks that did would wait without end
    where training workers have taken all. The caller reserves CPUs for them with its own.

    Args:
        table: `CocoIndex.table`; put into the object store once.
        plans: The batches, from `plan_run` or `plan_validation`.
        settings: How records become samples.
        num_cpus: Decoding tasks at a time, each busy on one CPU.
        prefetch_batches: Batches fetched to this process ahead of use.

    Raises:
        ImageError: A bad image with `on_bad_image` "stop", when its batch is reached.
    """
    import ray

    plans = [BatchPlan(*plan) for plan in plans]
    if not plans:
        return
    epochs, steps, rows = (list(column) for column in zip(*plans, strict=True))
    plan_table = pa.table({"epoch": epochs, "step": steps, "rows": rows})
    decode = _decode_row(ray.put(table), ray.put(plan_table), settings)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    for start in range(0, len(plans), _BATCHES_PER_DATASET):
        # Rows made here, not by a reading task, which would ask for a CPU.
        plan_rows = [{"id": row} for row in range(start, min(start + _BATCHES_PER_DATASET, len(plans)))]
        with _data_context(num_cpus):
            planned = ray.data.from_items(plan_rows, override_num_blocks=-(-len(plan_rows) // _BATCHES_PER_TASK))
            tasks = ray.data.TaskPoolStrategy(size=num_cpus)
            dataset = planned.map(decode, num_cpus=0, label_selector=here, compute=tasks)
        batches = dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=prefetch_batches)
        block: Any
        for block in batches:
            batch = pickle.loads(block.column("batch")[0].as_buffer())  # noqa: S301  written by our own task
            if isinstance(batch, ImageError):
                raise batch
            yield batch


def _decode_row(table_ref: Any, plan_ref: Any, settings: DecodeSettings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def decode(row: dict[str, Any]) -> dict[str, Any]:
        import ray

        cv2.setNumThreads(1)  # one CPU was asked for
        table, plan_table = ray.get([table_ref, plan_ref])
        plan = BatchPlan(**read_record(plan_table, row["id"]))
        try:
            result: BatchDict | ImageError = decode_batch(table, plan, settings)
        except ImageError as error:  # raised where the batch is used, without Ray's wrapping
            result = error
        return {"batch": pickle.dumps(result, protocol=5)}

    return decode


@contextlib.contextmanager
def _data_context(num_cpus: int) -> Iterator[None]:
    """Settings that a dataset takes over when it is made: plan order, quiet, a batch a block, bounded memory."""
    from ray.data import DataContext

    for name in ("progress", "execution.streaming_executor"):  # one line each a run that says nothing
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # a block is cut off after every batch
    context.target_min_block_size = 1
    with DataContext.current(context):
        yield


def _pack(samples: Sequence[dict[str, Any]], settings: DecodeSettings) -> BatchDict:
    size, mask_size = settings.resolution, settings.mask_size
    row_bytes = 0 if mask_size is None else -(-mask_size * mask_size // 8)

    def join(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([sample[name] for sample in samples]) if samples else empty

    with_pixels = [row for row, sample in enumerate(samples) if sample["image"] is not None]
    return {
        "images": np.stack([samples[row]["image"] for row in with_pixels])
        if with_pixels
        else np.zeros((0, size, size, 3), dtype=np.uint8),
        "image_rows": np.array(with_pixels, dtype=np.int64),
        "feature_keys": [sample["feature_key"] for sample in samples],
        "image_ids": np.array([sample["image_id"] for sample in samples], dtype=np.int64),
        "paths": [sample["path"] for sample in samples],
        "original_sizes_hw": np.array([s["original_size_hw"] for s in samples], dtype=np.int64).reshape(-1, 2),
        "placements": [sample["placement"] for sample in samples],
        "query_image": np.repeat(
            np.arange(len(samples), dtype=np.int64), [len(sample["prompts"]) for sample in samples]
        ),
        "prompts": [prompt for sample in samples for prompt in sample["prompts"]],
        "categories": [category for sample in samples for category in sample["categories"]],
        "is_positive": join("is_positive", np.zeros(0, dtype=bool)),
        "num_targets": join("num_targets", np.zeros(0, dtype=np.int64)),
        "boxes_cxcywh": join("boxes_cxcywh", np.zeros((0, 4), dtype=np.float32)),
        "masks_packed": None if mask_size is None else join("masks_packed", np.zeros((0, row_bytes), dtype=np.uint8)),
        "mask_size": mask_size,
        "mask_valid": join("mask_valid", np.zeros(0, dtype=bool)),
        "annotation_ids": join("annotation_ids", np.zeros(0, dtype=np.int64)),
        "num_limited": sum(sample["num_limited"] for sample in samples),
    }
