"""A COCO folder into training, validation and test splits that share no picture and have all categories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3lora.data.convert.faults import Fault, FaultLog
from sam3lora.data.convert.labelled_set import LabelledImage, LabelledSet
from sam3lora.data.convert.layout import new_folder
from sam3lora.data.convert.read_coco import find_coco_folders, read_coco
from sam3lora.data.convert.report import render_faults, render_splits
from sam3lora.data.convert.write_coco import write_coco
from sam3lora.data.split.grouping import group_images, read_fingerprints
from sam3lora.data.split.leakage import Leak, find_leaks
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

SPLITS = ("train", "valid", "test")
TOLERANCE = 0.05  # a share of the images further from its fraction is worth a word


@dataclass
class SplittingReport:
    """What `split_folder` wrote.

    Args:
        target: The new folder.
        fractions: Share of the images that each split should have.
        splits: Split -> `num_images`, `num_groups`, `num_negatives`, `num_objects`, `categories` (name -> objects).
        largest_group: Images that had to stay together.
        leaks: Hints that splits still share something: numbered names that look like frames of one recording.
        faults: What was repaired or left out while reading.
    """

    target: str
    fractions: dict[str, float]
    splits: dict[str, dict[str, Any]]
    largest_group: int
    leaks: list[Leak] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        leaks = [leak.to_dict() for leak in self.leaks]
        return {**vars(self), "leaks": leaks, "faults": [fault.to_dict() for fault in self.faults]}

    def render(self, console: Console | None = None) -> None:
        """Print tables."""
        from rich.console import Console
        from rich.markup import escape

        console = console or Console()
        render_splits(self.splits, console)
        groups = sum(split["num_groups"] for split in self.splits.values())
        console.print(f"{groups} groups of images that belong together, the largest of {self.largest_group}")
        num_images = sum(split["num_images"] for split in self.splits.values())
        for name, fraction in self.fractions.items():
            share = self.splits[name]["num_images"] / num_images
            if abs(share - fraction) > TOLERANCE:
                console.print(f"[yellow]{name} has {share:.0%} of the images, not {fraction:.0%}[/yellow]")
        if self.leaks:
            console.print(
                f"[yellow]{sum(leak.count for leak in self.leaks)} names look like neighbouring frames or tiles of one "
                f"recording in two splits, e.g. {escape(self.leaks[0].examples[0])}: --group-by keeps them together[/]"
            )
        render_faults(self.faults, console)


def split_folder(
    source: str | Path,
    target: str | Path,
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    group_by: str | None = None,
) -> SplittingReport:
    """Split a data set by chance, each category near the fractions, without a picture in two splits.

    Copies and near-duplicates stay together (`sam3lora.data.split.grouping`). Equal arguments give equal splits.

    Args:
        source: COCO folder; splits that it has are joined first.
        target: Folder to write, new or empty; it appears whole at the end or not at all.
        fractions: Shares of train, valid and, if there are three, test; they add up to 1.
        seed: Of the order in which equal choices are made.
        group_by: Regular expression; images whose names agree on it stay together.

    Raises:
        UserError: Fractions that are none, fewer groups than splits, no COCO folder, or a target that holds something.
    """
    source, target = Path(source), Path(target)
    names = SPLITS[: len(fractions)]
    if not 2 <= len(fractions) <= 3 or min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        given = " ".join(f"{share:g}" for share in fractions)
        raise UserError(f"--fractions takes two or three positive numbers that add up to 1 (0.8 0.1 0.1), got {given}")
    if not source.is_dir() or not find_coco_folders(source):
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
    """Deal groups to splits so that each label comes near its fractions: iterative stratification.

    The label of which least is left is dealt first, a group at a time, to the split that lacks most of it. Groups of
    many images go first, so that the small ones even out what is left; otherwise the order is random, so that no split
    gets the crowded images.

    Source: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011, algorithm 1,
    with counts in place of 0 and 1.

    Args:
        counts_GK: How much of each label (a category, say) each group has. The last column is the number of its images:
            it decides between splits that lack as much of a label. Each group has some label.
        fractions: Share of each split.
        seed: Of the order among equals.

    Returns:
        Split number of each group.

    Raises:
        UserError: Fewer groups than splits.
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
    """Give each split without images the smallest group of the split that has most above its share."""
    for split in range(len(wanted_S)):
        if not (assigned == split).any():
            num_groups_S = np.bincount(assigned, minlength=len(wanted_S))
            giver = int(np.where(num_groups_S > 1, wanted_S, np.inf).argmin())
            members = np.flatnonzero(assigned == giver)
            group = members[sizes_G[members].argmin()]
            assigned[group] = split
            wanted_S[[giver, split]] += (sizes_G[group], -sizes_G[group])


def _count_labels(images: Sequence[LabelledImage], groups: np.ndarray, categories: Sequence[str]) -> np.ndarray:
    """Per group: objects of each category, images without objects, images."""
    columns = {name: column for column, name in enumerate(categories)}
    counts_GK = np.zeros((int(groups.max()) + 1, len(categories) + 2), dtype=int)
    for image, group in zip(images, groups, strict=True):
        for thing in image.objects:
            counts_GK[group, columns[thing.category]] += 1
        counts_GK[group, -2] += not image.objects
        counts_GK[group, -1] += 1
    return counts_GK
