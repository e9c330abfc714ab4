"""The HTML report of a sweep: the best settings, what searching gained, and how certain that is."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3lora.evaluation.report.html_page import fault_box, render_page, setting_rows
from sam3lora.tune.estimate.sweep_time import duration
from sam3lora.tune.report import charts as sweep_charts
from sam3lora.tune.report.charts import ChartedTrials, short_count
from sam3lora.tune.report.importance import importances
from sam3lora.tune.report.parallel_coordinates import parallel_coordinates
from sam3lora.tune.report.sentences import METRIC_LABELS, answer, held_out_sentence, short_names, vision_sentence
from sam3lora.tune.run.ledger import Rejection, TrialRecord, has_value, seconds_in_sessions
from sam3lora.tune.space.search_space import SearchSpace, adapter_mb

_MOST_REJECTED = 30
_STATUS_WORDS = {"stopped": "stopped early", "pending": "waiting"}


@dataclass(frozen=True)
class TrialRow:
    """One line of the table of trials; `settings` are text and whether it differs from the base."""

    record: TrialRecord
    status: str
    note: str
    difference: float | None
    settings: list[tuple[str, bool]]
    size: str
    megabytes: str
    time: str


def render_sweep(
    space: SearchSpace, records: Sequence[TrialRecord], rejections: Sequence[Rejection], summary: Mapping[str, Any]
) -> str:
    """The report as one HTML page without any reference outside itself.

    Args:
        summary: `name`, `sweep_dir`, `metric`, `mode`, `algorithm`, `num_trials`, `sessions` (`started_at` and
            `ended_at` of each, seconds since 1970), `best` and `base` (numbers or None), `max_concurrent`, `versions`,
            `held_out` (from `measure_held_out`, or None), `vision` (`passes` through the vision trunk, `images`
            of the data, or None), `faults` (of the training and validation splits, as from `split_faults`).
    """
    by_number = {record.number: record for record in records}
    best = by_number.get(summary["best"])
    base = by_number.get(summary["base"]) or next((record for record in records if record.is_base), None)
    metric = METRIC_LABELS.get(summary["metric"], summary["metric"])
    trials = ChartedTrials(records, summary["metric"], metric, summary["mode"], summary["best"], summary["base"])
    short = short_names(list(space.parameters))
    free = list(space.free.values())
    importance = importances(records, free)
    held_out = summary.get("held_out") or {}
    return render_page(
        "sweep_report.html.j2",
        title=f"Sweep {summary['name']}",
        answer=answer(space, records, best, base, summary),
        held_out=held_out_sentence(held_out),
        fault_box=fault_box([*summary.get("faults", []), *held_out.get("faults", [])]),
        unfinished=_unfinished(records, summary),
        metric=metric,
        direction="lower is better" if summary["mode"] == "min" else "higher is better",
        best=best,
        base=base,
        best_against_base=_best_against_base(space, best, base),
        models=list(held_out.get("models", {}).items()),
        held_out_metrics=_names_of_metrics(held_out.get("models", {})),
        task=space.base.task,
        best_folder=shlex.quote(str(Path(summary["sweep_dir"], "best"))),
        best_config=shlex.quote(str(Path(summary["sweep_dir"], "best", "config.yaml"))),
        charts={
            "progress": sweep_charts.progress_chart(trials, summary["sessions"]),
            "curves": sweep_charts.learning_curves(trials),
            "settings": parallel_coordinates(trials, free, short),
            "importance": sweep_charts.importance_chart(importance, short),
            "size": sweep_charts.size_chart(trials),
        },
        importances=importance,
        is_adaptive=summary["algorithm"] == "optuna",
        short=short,
        parameters=list(space.parameters),
        rows=_rows(space, records, base, summary["mode"]),
        failed=[record for record in records if record.status == "failed"],
        rejections=[(rejection, _labels(space, rejection.values)) for rejection in rejections[:_MOST_REJECTED]],
        num_rejected=len(rejections),
        rejected_kinds=Counter(rejection.kind for rejection in rejections).most_common(),
        vision=vision_sentence(summary.get("vision"), records),
        settings=setting_rows([_settings(space, summary)]),
        labels=[],
    )


def _names_of_metrics(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The metrics of any of the models, and what tables call them."""
    return {name: METRIC_LABELS.get(name, name) for values in models.values() for name in values}


def _unfinished(records: Sequence[TrialRecord], summary: Mapping[str, Any]) -> str:
    ended = sum(record.has_ended for record in records)
    total = max(summary["num_trials"] or 0, len(records))
    if ended >= total:
        return ""
    if summary.get("ran_out") and ended == len(records):
        return f"{ended} trials instead of {total}: the search space has no further configuration that is allowed."
    return f"The sweep is not over: {ended} of {total} trials have ended. --resume goes on with it."


def _best_against_base(
    space: SearchSpace, best: TrialRecord | None, base: TrialRecord | None
) -> list[tuple[str, str, str, bool]]:
    if best is None or base is None or best.number == base.number:
        return []
    texts = zip(space.parameters, _labels(space, base.values), _labels(space, best.values))
    return [(name, before, after, before != after) for name, before, after in texts]


def _rows(space: SearchSpace, records: Sequence[TrialRecord], base: TrialRecord | None, mode: str) -> list[TrialRow]:
    """The best first, then those without a value by number."""
    sign = 1 if mode == "min" else -1

    def order(record: TrialRecord) -> tuple[bool, float, int]:
        is_known = has_value(record)
        return not is_known, sign * (record.value or 0.0) if is_known else 0.0, record.number

    return [_row(space, record, base) for record in sorted(records, key=order)]


def _row(space: SearchSpace, record: TrialRecord, base: TrialRecord | None) -> TrialRow:
    def differs(name: str) -> bool:
        return base is not None and not record.is_base and record.values.get(name) != base.values.get(name)

    notes = [_retry(retry) for retry in record.retries]
    if record.status == "failed":
        notes.insert(0, f"{record.failure}: {record.reason}" if record.reason else str(record.failure))
    return TrialRow(
        record=record,
        status=_STATUS_WORDS.get(record.status, record.status),
        note="; ".join(notes),
        difference=None if record.is_base or base is None else _difference(record, base),
        settings=[(text, differs(name)) for name, text in zip(space.parameters, _labels(space, record.values))],
        size=short_count(record.trainable_parameters) if record.trainable_parameters else "n/a",
        megabytes=f"{adapter_mb(record.trainable_parameters):.3g} MB",
        time=duration(record.seconds),
    )


def _labels(space: SearchSpace, values: Mapping[str, Any]) -> list[str]:
    return [space.label(name, values[name]) if name in values else "" for name in space.parameters]


def _difference(record: TrialRecord, base: TrialRecord) -> float | None:
    if record.value is None or base.value is None or not has_value(record) or not has_value(base):
        return None
    return record.value - base.value


def _retry(retry: Mapping[str, Any]) -> str:
    changes = [f"{name} {retry[name]}" for name in ("batch_size", "gradient_accumulation_steps") if name in retry]
    return f"retried after {retry.get('reason', 'a failure')}" + (f" with {', '.join(changes)}" if changes else "")


def _settings(space: SearchSpace, summary: Mapping[str, Any]) -> dict[str, Any]:
    sessions = list(summary["sessions"])
    last = max((session.get("ended_at") or session["started_at"] for session in sessions), default=0.0)
    search, stopping = space.search, space.early_stopping
    bounds = {name: bound for name, bound in space.constraints.model_dump().items() if bound is not None}
    return {
        "search space": summary["name"],
        "base": space.base_name,
        **{name: f"{item.kind}: {item.describe()}" for name, item in space.parameters.items()},
        "constraints": bounds or "none",
        "metric": f"{summary['metric']}, {'lower' if summary['mode'] == 'min' else 'higher'} is better",
        "objective": search.objective.replace("_", " "),
        "searcher": f"{summary['algorithm']}, seed {search.seed}",
        "early stopping": stopping.scheduler
        + (f", one of {stopping.reduction_factor} goes on" if stopping.scheduler == "asha" else ""),
        "trials": summary["num_trials"],
        "trials at a time": summary["max_concurrent"],
        "time the sweep ran": duration(seconds_in_sessions(last, sessions)),
        "starts": len(sessions),
        "versions": summary["versions"],
    }
