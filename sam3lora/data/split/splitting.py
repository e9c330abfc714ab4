"""Splitting a COCO folder into training, validation and test sets that share no picture and have all categories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sam3lora.data.convert.coco_folders import read_coco, write_coco
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet
from sam3lora.data.convert.layout import new_folder
from sam3lora.data.faults import Fault, FaultLog
from sam3lora.data.split.grouping import group_images, read_fingerprints
from sam3lora.data.split.leakage import Leak, find_leaks
from sam3lora.data.split_files import find_splits
from sam3lora.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass
class SplittingReport:
    """What `split_folder` wrote to `target`."""

    target: str
    fractions: dict[str, float]  # share of the images that each split should have
    splits: dict[str, dict[str, Any]]  # see `LabelledSet.summary`; also `num_groups`
    largest_group: int  # number of images that stay together
    leaks: list[Leak] = field(default_factory=list)  # only neighbouring frames can remain
    faults: list[Fault] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        leaks = [leak.to_dict() for leak in self.leaks]
        return {**vars(self), "leaks": leaks, "faults": [fault.to_dict() for fault in self.faults]}


def split_folder(
    source: str | Path,
    target: str | Path,
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    group_by: str | None = None,
) -> SplittingReport:
    """Split a data set at random so that each category is near the fractions and no picture is in two splits.

    Copies and near-duplicates stay together (`sam3lora.data.split.grouping`). Equal arguments give equal splits.

    Args:
        source: COCO folder; existing splits are joined first.
        target: Folder to write, new or empty; after an error nothing is left in it.
        fractions: Shares of train, valid and optionally test; they add up to 1.
        seed: Seed of the order in which equal choices are made.
        group_by: Regular expression; images whose names agree on it stay together.

    Raises:
        UserError: The fractions are invalid, there are fewer groups than splits, the source is not a COCO folder, or
            the target is not empty.
    """
    source, target = Path(source), Path(target)
    names = SPLITS[: len(fractions)]
    if not 2 <= len(fractions) <= 3 or min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        given = " ".join(f"{share:g}" for share in fractions)
        raise UserError(f"--fractions takes two or three positive numbers that add up to 1 (0.8 0.1 0.1), got {given}")
    if not source.is_dir() or not find_splits(source):
        raise UserError(f"no COCO data set in {source}; convert it first: sam3lora data convert {source} NEW_FOLDER")
    log = FaultLog()
    with new_folder(target, source) as folder:
        labelled = read_coco(source, None, log)
        images = list(labelled.images())
        file_names = [image.path.name for image in images]
        fingerprints = read_fingerprints([image.path for image in images])
        groups, unmatched = group_images(file_names, fingerprints, group_by)
        for name in unmatched:
            log.add("unmatched_name", name)
        assigned = assign_groups(_count_labels(images, groups, labelled.categories), fractions, seed)
        chosen = assigned[groups]
        splits = {
            name: [image for image, split in zip(images, chosen, strict=True) if split == number]
            for number, name in enumerate(names)
        }
        divided = LabelledSet(labelled.categories, splits)
        write_coco(divided, folder, log)
    summary = divided.summary()
    for number, name in enumerate(names):
        summary[name]["num_groups"] = int((assigned == number).sum())
    digests: dict[str, dict[str, str]] = {name: {} for name in names}
    for file_name, fingerprint, split in zip(file_names, fingerprints, chosen, strict=True):
        digests[names[split]][file_name] = fingerprint.digest
    return SplittingReport(
        target=str(target),
        fractions=dict(zip(names, fractions, strict=True)),
        splits=summary,
        largest_group=int(np.bincount(groups).max()),
        leaks=find_leaks(digests),
        faults=list(log),
    )


def assign_groups(counts_GK: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """The split number of each group, so that each label comes near its fractions: iterative stratification.

    The rarest remaining label is assigned first: each of its groups goes to the split that lacks most of that label.
    Large groups go first, so that small groups can even out the rest. Groups of equal size are in random order, so that
    no split gets all the crowded images.

    Source: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011, algorithm 1,
    with counts instead of 0 and 1.

    Args:
        counts_GK: Count of each label (a category, for example) in each group; every group has at least one label. The
            last column is the number of images, which decides between splits that lack equally much of a label.

    Raises:
        UserError: There are fewer groups than splits.
    """
    num_groups, num_splits = len(counts_GK), len(fractions)
    if num_groups < num_splits:
        raise UserError(f"{num_groups} group(s) of images that belong together cannot fill {num_splits} splits")
    shuffled = np.random.default_rng(seed).permutation(num_groups)
    wanted_SK = np.outer(fractions, counts_GK.sum(axis=0)).astype(float)
    assigned = np.full(num_groups, -1)
    while (assigned < 0).any():
        left_K = counts_GK[assigned < 0, :-1].sum(axis=0)
        label = int(np.where(left_K > 0, left_K, np.inf).argmin())
        members = [group for group in shuffled if assigned[group] < 0 and counts_GK[group, label] > 0]
        for group in sorted(members, key=lambda group: -counts_GK[group, -1]):
            split = max(range(num_splits), key=lambda split: (wanted_SK[split, label], wanted_SK[split, -1]))
            assigned[group] = split
            wanted_SK[split] -= counts_GK[group]
    _fill_empty(assigned, counts_GK[:, -1], wanted_SK[:, -1])
    return assigned


def _fill_empty(assigned: np.ndarray, sizes_G: np.ndarray, wanted_S: np.ndarray) -> None:
    """Give each empty split the smallest group of the split that exceeds its share most."""
    for split in range(len(wanted_S)):
        if not (assigned == split).any():
            num_groups_S = np.bincount(assigned, minlength=len(wanted_S))
            giver = int(np.where(num_groups_S > 1, wanted_S, np.inf).argmin())
            members = np.flatnonzero(assigned == giver)
            group = members[sizes_G[members].argmin()]
            assigned[group] = split
            wanted_S[[giver, split]] += (sizes_G[group], -sizes_G[group])


def _count_labels(images: Sequence[LabelledImage], groups: np.ndarray, categories: Sequence[str]) -> np.ndarray:
    """For each group: number of objects of each category, of images without objects, and of images."""
    columns = {name: column for column, name in enumerate(categories)}
    counts_GK = np.zeros((int(groups.max()) + 1, len(categories) + 2), dtype=int)
    for image, group in zip(images, groups, strict=True):
        for thing in image.objects:
            counts_GK[group, columns[thing.category]] += 1
        counts_GK[group, -2] += not image.objects
        counts_GK[group, -1] += 1
    return counts_GK
