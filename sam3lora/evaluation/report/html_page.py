"""Rendering of reports as one self-contained HTML file: templates and the format of values and settings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import jinja2

from sam3lora.data.fault_report import SplitFault, left_out_sentence, table_rows


def render_page(template: str, **values: Any) -> str:
    """HTML that refers to no other file, from a file in `templates`; values are escaped."""
    return _environment().get_template(template).render(**values)


def score(value: float | int | None) -> str:
    """A metric with three decimals, or a count."""
    return "n/a" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def change(value: float | int | None) -> str:
    """A difference with its sign."""
    return "n/a" if value is None else f"{value:+d}" if isinstance(value, int) else f"{value:+.3f}"


def threshold(value: float | None) -> str:
    """A score threshold with two decimals."""
    return "n/a" if value is None else f"{value:.2f}"


def share(part: int, whole: int, what: str) -> str:
    """ "3 of 40 images (8 %)"."""
    return f"{part} of {whole} {what}" + (f" ({100 * part / whole:.0f} %)" if whole else "")


def setting_rows(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(name, values of the results), with a single value where they agree."""
    rows = []
    for name in dict.fromkeys(name for entry in settings for name in entry):
        values = [_plain(entry.get(name)) for entry in settings]
        rows.append((name, values[:1] if len(set(values)) == 1 else values))
    return rows


def fault_box(faults: Sequence[SplitFault]) -> dict[str, Any] | None:
    """What the templates' `faults` shows of the data; None without a fault."""
    if not faults:
        return None
    splits, rows = table_rows(faults)
    return {"left_out": left_out_sentence(faults), "splits": splits, "rows": rows}


class MeasuredRun(Protocol):
    """What the metrics of one model on a split say of how they came about."""

    @property
    def label(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def faults(self) -> Sequence[SplitFault]: ...


def facts_of_run(metrics: MeasuredRun) -> dict[str, Any]:
    """What the end of a page about one model shows: its settings, notes, and the faults of the data."""
    return {
        "labels": [metrics.label],
        "settings": setting_rows([metrics.settings]),
        "notes": metrics.notes,
        "fault_box": fault_box(metrics.faults),
    }


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sam3lora.evaluation.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": score, "change": change, "threshold": threshold, "data_uri": _data_uri}
    return environment
