"""The splits of a run, and the batches of each worker."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from sam3lora.config import Config
from sam3lora.data.batch import Batch
from sam3lora.data.coco import CocoIndex, merge_names
from sam3lora.data.fault_report import count_left_out, faults_as_reason, split_faults
from sam3lora.data.index_columns import object_columns
from sam3lora.data.index_digest import index_digest
from sam3lora.data.pipeline import SharedTable, iterate_batches, stream_batches
from sam3lora.data.plan import BatchPlan, plan_run, plan_validation, share_of
from sam3lora.data.prompts import incomplete_prompts, prompt_key
from sam3lora.data.sample import DecodeSettings, rows_with_queries
from sam3lora.data.split_files import SplitFiles, find_split, missing_split, required_split
from sam3lora.errors import UserError
from sam3lora.training import distributed
from sam3lora.training.prefetch import prefetch

logger = logging.getLogger(__name__)


@dataclass
class RunData:
    """The training split, the validation split if there is one, and how their records are decoded.

    ``train`` and ``valid`` hold the images that have a loss; ``valid_complete`` holds all that metrics are measured on.
    ``faults`` are those of both annotation files, from `split_faults`. ``digest`` is from `data_digest`. Of a dense
    run ``prompts`` are its classes, of one of task clicks the categories.
    """

    train: CocoIndex
    valid: CocoIndex | None
    valid_complete: CocoIndex | None
    train_settings: DecodeSettings
    valid_settings: DecodeSettings
    prompts: tuple[str, ...]
    faults: list[dict[str, Any]]
    digest: dict[str, str]
    no_valid: str | None = None  # where validation images were looked for, if there are none

    def file_names(self) -> dict[str, list[str]]:
        """The images of each split, under the names that they have in ``digest``."""
        splits = {"train images": self.train, "valid images": self.valid_complete}
        return {name: index.table["file_name"].to_pylist() if index else [] for name, index in splits.items()}

    def summary(self) -> dict[str, Any]:
        counts = dict.fromkeys(self.train.names, 0) | object_columns(self.train.table).count_per_category()
        left_out = count_left_out(self.faults)
        return {
            "num_train_images": len(self.train),
            "num_valid_images": len(self.valid) if self.valid else 0,
            "num_labels_left_out": left_out["labels"],
            "num_images_left_out": left_out["images"],
            "objects_per_category": counts,
            **self._asked(),
        }

    def _asked(self) -> dict[str, Any]:
        if self.train_settings.label_maps is not None:
            labels = self.train_settings.label_maps.values
            return {"classes": list(self.prompts), "value_of_category": dict(labels)}
        return {"prompts": list(self.prompts), "prompt_of_category": dict(self.train_settings.prompts_map)}


Splits = tuple[CocoIndex, CocoIndex | None]
"""The indexes of the training split, and of the validation split if there is one."""


def read_splits(config: Config) -> Splits:
    data, root = config.data, config.training.required_data_dir()
    train = _index(config, required_split(root, data.train_split, data.annotation_file))
    valid_files = find_split(root, data.valid_split, data.annotation_file)
    return train, _index(config, valid_files) if valid_files is not None else None


def data_digest(train: CocoIndex, valid: CocoIndex | None) -> dict[str, str]:
    """Number and digest of images and labels of both splits, by names for people."""
    found = {f"train {what}": value for what, value in index_digest(train).items()}
    of_valid = index_digest(valid) if valid is not None else dict.fromkeys(("images", "labels"), "none")
    return found | {f"valid {what}": value for what, value in of_valid.items()}


def load_run_data(config: Config, resolution: int, patch_size: int = 14, *, splits: Splits | None = None) -> RunData:
    """Index both splits and leave out the images without a query, which have no loss.

    `resolution` and `patch_size` are the model's, in pixels. `splits` are from `read_splits`, if they are read already.
    """
    data, training = config.data, config.training
    root = training.required_data_dir()
    train, valid = splits or read_splits(config)
    names = merge_names([train, valid] if valid else [train])
    known = {prompt_key(name) for name in names}
    complete = () if isinstance(data.exhaustive, bool) else data.exhaustive
    for key, written in (("prompts", data.prompts), ("exhaustive", complete)):
        for name in written:
            if prompt_key(name) not in known:
                raise UserError(
                    f"data.{key} names {name!r}, which no annotation of {root} has; it has {', '.join(names)}"
                )
    incomplete = incomplete_prompts(names, data.prompts, data.exhaustive)
    for prompt in data.negative_prompts:
        if prompt_key(prompt) in incomplete:
            raise UserError(
                f"data.negative_prompts says that no image shows {prompt!r}, but it is a category of {root} whose "
                "objects are not all annotated (data.exhaustive): remove it there or name its category here"
            )
    settings = decode_settings(
        config,
        names,
        resolution,
        mask_grid(resolution, patch_size) if training.loss.mask_resolution == "low" else resolution,
        prompts_map=data.prompts,
        negative_prompts=data.negative_prompts,
        num_negatives=training.num_negatives,
        exhaustive=data.exhaustive,
        max_objects=data.max_objects_per_query,
    )
    prompt_of = {prompt_key(name): prompt for name, prompt in data.prompts.items()}
    asked = [prompt_of.get(prompt_key(name), name) for name in names]
    found = run_data(config, (train, valid), settings, tuple(dict.fromkeys([*asked, *data.negative_prompts])))
    found.train = _with_queries(train, settings, data.train_split)
    found.valid = _with_queries(valid, found.valid_settings, data.valid_split) if valid else None
    return found


def mask_grid(resolution: int, patch_size: int) -> int:
    """Side of predicted masks and label maps, which have 4 x 4 pixels to a patch."""
    return resolution // patch_size * 4


def decode_settings(
    config: Config, names: tuple[str, ...], resolution: int, mask_size: int, **of_task: Any
) -> DecodeSettings:
    """How training images and labels are decoded.

    Args:
        names: All categories.
        resolution, mask_size: Sides of images and of masks or label maps in pixels.
        of_task: Further fields of `DecodeSettings`.
    """
    return DecodeSettings(
        names=names,
        resolution=resolution,
        mask_size=mask_size,
        augmentation=config.data.augmentation,
        horizontal_flip=config.data.horizontal_flip,
        vertical_flip=config.data.vertical_flip,
        on_bad_image=config.training.on_bad_image,
        seed=config.training.seed,
        **of_task,
    )


def run_data(config: Config, splits: Splits, settings: DecodeSettings, prompts: tuple[str, ...]) -> RunData:
    """The data of a run in which every image of the splits has a loss; `settings` are those of training."""
    (train, valid), data = splits, config.data
    # A fixed seed, so that the validation losses of runs with different seeds are means over the same queries.
    unchanged: dict[str, Any] = {"augmentation": "none", "horizontal_flip": 0.0, "vertical_flip": 0.0}
    no_valid = missing_split(config.training.required_data_dir(), data.valid_split, data.annotation_file)
    return RunData(
        train=train,
        valid=valid,
        valid_complete=valid,
        train_settings=settings,
        valid_settings=replace(settings, **unchanged, max_objects=None, seed=0),
        prompts=prompts,
        faults=split_faults(data.train_split, train.faults)
        + (split_faults(data.valid_split, valid.faults) if valid else []),
        digest=data_digest(train, valid),
        no_valid=None if valid else no_valid,
    )


class BatchSource:
    """Batches of this worker, decoded ahead of use by Ray Data, or without Ray by a thread of this process.

    A step takes ``images_per_step`` images over all workers; this one's share comes in ``forwards_per_step`` batches of
    at most ``batch_size`` images, none where there are more workers than images.

    For a GPU the batches are in page-locked memory. ``load_ahead`` is called with each batch before its use, on the
    thread that prepares the batches. ``other_nodes`` of Ray are those that `stream_batches` may use.
    """

    def __init__(
        self,
        data: RunData,
        config: Config,
        *,
        images_per_step: int,
        use_ray: bool,
        device: torch.device | None = None,
        load_ahead: Callable[[Batch], object] | None = None,
        other_nodes: Collection[str] = (),
    ) -> None:
        self._other_nodes = other_nodes
        self._data, self._training, self._use_ray = data, config.training, use_ray
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._load_ahead = load_ahead
        self._train_table = SharedTable(data.train.table)
        self._valid_table = SharedTable(data.valid.table) if data.valid else None
        self.num_validated = len(range(len(data.valid or ()))[: config.evaluation.num_samples])
        """Images of a validation loss: the first ones with a query."""
        self.images_per_step = images_per_step
        self.steps_per_epoch = -(-len(data.train) // images_per_step)
        share = share_of(images_per_step, distributed.world_size(), distributed.rank())
        self.forwards_per_step = -(-(share.stop - share.start) // config.training.images_per_forward)

    def training_batches(self, start_epoch: int, start_step: int) -> Generator[Batch]:
        """Batches from a step of an epoch to the end of the run, ``forwards_per_step`` for each step."""
        plans = self._plans(start_epoch, start_step)
        return self._decode(self._train_table, plans, self._data.train_settings)

    def validation_batches(self) -> Generator[Batch]:
        """This worker's share of the images of a validation loss, each image once over all workers."""
        assert self._valid_table is not None
        plans = plan_validation(
            self.num_validated,
            batch_size=self._training.images_per_forward,
            world_size=distributed.world_size(),
            rank=distributed.rank(),
        )
        return self._decode(self._valid_table, plans, self._data.valid_settings)

    def _plans(self, start_epoch: int, start_step: int) -> Iterator[BatchPlan]:
        if not self.forwards_per_step:
            return
        size = self._training.images_per_forward
        steps = plan_run(
            len(self._data.train),
            images_per_step=self.images_per_step,
            num_epochs=self._training.num_epochs,
            world_size=distributed.world_size(),
            rank=distributed.rank(),
            seed=self._training.seed,
            start_epoch=start_epoch,
            start_step=start_step,
        )
        for epoch, step, rows in steps:
            for start in range(0, len(rows), size):
                yield BatchPlan(epoch, step, rows[start : start + size])

    def _decode(self, shared: SharedTable, plans: Iterator[BatchPlan], settings: DecodeSettings) -> Generator[Batch]:
        if self._use_ray:
            num_cpus, others = self._training.num_workers, self._other_nodes
            batches = stream_batches(shared, plans, settings, num_cpus=num_cpus, other_nodes=others)
            yield from prefetch(batches, self._prepare)
            return
        # A copy for the decoding thread: two threads cannot share a store.
        settings = replace(settings, store=copy.copy(settings.store))
        # Where features are cached, decoding of an epoch waits for the features of the epoch before.
        epochs = groupby(plans, key=lambda plan: settings.features is not None and plan.epoch)
        for _, plans_of_epoch in epochs:
            yield from prefetch(iterate_batches(shared.table, plans_of_epoch, settings), self._prepare)

    def _prepare(self, batch: Batch) -> Batch:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # for this thread; otherwise the first GPU would lock the memory
            batch = batch.pin_memory()
        if self._load_ahead is not None:
            self._load_ahead(batch)
        return batch


def _index(config: Config, split: SplitFiles) -> CocoIndex:
    index = split.read(config.training.on_bad_image)
    if config.data.categories is None:
        return index
    present = {prompt_key(name) for name in index.names}
    wanted = [name for name in config.data.categories if prompt_key(name) in present]
    return index.select_categories(wanted or config.data.categories)


def _with_queries(index: CocoIndex, settings: DecodeSettings, split: str) -> CocoIndex:
    rows = rows_with_queries(index.table, settings)
    if not rows:
        advice = "no object of the chosen categories and no negative prompt. Check data.categories, or list "
        advice += "data.negative_prompts"
        if index.faults.count("all_crowd"):
            advice = "all of its labels are crowd regions (iscrowd), which hold no object to find"
        raise UserError(
            f"{index.source}: no image has a query: {advice}" + faults_as_reason(split_faults(split, index.faults))
        )
    if len(rows) < len(index):
        num_left = len(index) - len(rows)
        logger.warning("%s: left out %d of %d images, which have no query", index.source, num_left, len(index))
        index = index.select_rows(rows)
    return index
