"""What people are told of the faults of a data set: lines for a terminal, rows for a table, and a sentence.

In files and between processes a fault is a dict: the values of `Fault.to_dict`, the name of its `split`, and
`leaves_out`, which says what each count is if that is left out whole: "images", "labels" or "results", else None.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3lora.data.faults import CHANGED, IMAGES_LEFT_OUT, LABELS_LEFT_OUT, LEVELS, LOST, Fault

TOLD = (LOST, CHANGED)
"""Levels that every command tells; those of level NOTE stand in the report of `sam3lora data check` only."""

_NAMED_KINDS = ("missing_image", "skipped_image")
MAX_LINES = 8  # kinds of faults in a summary

SplitFault = Mapping[str, Any]


def split_faults(
    split: str, faults: Iterable[Fault], levels: Sequence[str] = TOLD, *, labels: str = "labels"
) -> list[dict[str, Any]]:
    """The faults of a split as JSON values: what is lost first, then what is changed, the most frequent first.

    `labels` says what the entries of the file are: "labels" or "results".
    """
    units = dict.fromkeys(IMAGES_LEFT_OUT, "images") | dict.fromkeys(LABELS_LEFT_OUT, labels)
    kept = [fault for fault in faults if fault.level in levels]
    kept.sort(key=lambda fault: (*_rank(fault.kind, fault.level), -fault.count))
    return [{"split": split, **fault.to_dict(), "leaves_out": units.get(fault.kind)} for fault in kept]


def count_left_out(faults: Iterable[SplitFault]) -> dict[str, int]:
    """Number of whole `labels`, `images` and `results` that are left out."""
    counts = {"labels": 0, "images": 0, "results": 0}
    for fault in faults:
        if fault["leaves_out"]:
            counts[fault["leaves_out"]] += fault["count"]
    return counts


def left_out_sentence(faults: Iterable[SplitFault]) -> str:
    """For example "2 labels and 1 image are left out"; "" if none is.

    >>> left_out_sentence([{"leaves_out": "labels", "count": 2}, {"leaves_out": "images", "count": 1}])
    '2 labels and 1 image are left out'
    """
    counts = {what: count for what, count in count_left_out(faults).items() if count}
    named = [f"{count} {what if count > 1 else what.removesuffix('s')}" for what, count in counts.items()]
    *first, last = named or [""]
    said = f"{', '.join(first)} and {last}" if first else last
    return f"{said} {'are' if sum(counts.values()) > 1 else 'is'} left out" if named else ""


def fault_lines(faults: Iterable[SplitFault]) -> list[str]:
    """A line for each kind: count and splits, what is done, and an example. Lost images are named, the first few."""
    return [_line(of_kind) for of_kind in _by_kind(faults)]


def faults_as_reason(faults: Iterable[SplitFault]) -> str:
    """The faults as a sentence to end an error that they may have caused; "" if there are none."""
    lines = fault_lines(faults)
    return f". Faults of the labels: {'; '.join(lines)}" if lines else ""


def fault_summary(faults: Sequence[SplitFault], place: str | Path, what: str = "labels") -> str:
    """The first kinds of faults of the labels in a folder, and the command that shows all; "" if there are none.

    `what` is "results" for those of a predictions file, of which no command shows more.
    """
    lines = fault_lines(faults)
    if not lines:
        return ""
    more = len(lines) - MAX_LINES
    rest = [f"and {more} more kind{'s' * (more > 1)} of faults"] if more > 0 else []
    details = [f"details: sam3lora data check {shlex.quote(str(place))}"] if what == "labels" else []
    heading = f"The {what} in {place} have faults; {left_out_sentence(faults) or f'none of the {what} is left out'}:"
    return "\n  ".join([heading, *lines[:MAX_LINES], *rest, *details])


class FaultRow(NamedTuple):
    """One kind of fault as the texts of a table; `counts` has a text for each of the table's splits."""

    level: str
    counts: list[str]
    description: str
    action: str
    examples: str


def table_rows(faults: Iterable[SplitFault]) -> tuple[list[str], list[FaultRow]]:
    """The names of the splits, and a row for each kind of fault."""
    faults = list(faults)
    splits = list(dict.fromkeys(fault["split"] for fault in faults))
    rows = []
    for of_kind in _by_kind(faults):
        counts = {fault["split"]: fault["count"] for fault in of_kind}
        examples = [
            ("" if len(splits) == 1 else f"{fault['split']}: ") + "; ".join(fault["examples"])
            for fault in of_kind
            if fault["examples"]
        ]
        first = of_kind[0]
        rows.append(
            FaultRow(
                level=first["level"],
                counts=[str(counts.get(split, 0)) for split in splits],
                description=first["description"],
                action=first["action"],
                examples="; ".join(examples),
            )
        )
    return splits, rows


def _by_kind(faults: Iterable[SplitFault]) -> list[list[SplitFault]]:
    """The faults of each kind, in all splits; the order of levels and kinds is that of `split_faults`."""
    kinds: dict[str, list[SplitFault]] = defaultdict(list)
    for fault in faults:
        kinds[fault["kind"]].append(fault)
    return sorted(kinds.values(), key=lambda of_kind: _rank(of_kind[0]["kind"], of_kind[0]["level"]))


def _rank(kind: str, level: str) -> tuple[int, bool]:
    """What is left out because of another fault comes after all that are."""
    return LEVELS.index(level), kind == "left_out_label"


def _line(of_kind: Sequence[SplitFault]) -> str:
    first = of_kind[0]
    count = sum(fault["count"] for fault in of_kind)
    is_one = len(of_kind) == 1
    splits = first["split"] if is_one else ", ".join(f"{fault['split']} {fault['count']}" for fault in of_kind)
    examples = first["examples"] if first["kind"] in _NAMED_KINDS else first["examples"][:1]
    example = f", e.g. {'' if is_one else 'in ' + first['split'] + ' '}{'; '.join(examples)}" if examples else ""
    return f"{count} x {first['description']} ({splits}): {first['action']}{example}"
