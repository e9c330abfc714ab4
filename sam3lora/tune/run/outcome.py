"""The outcome of a sweep when its trials are over: tables, the best adapter, the held-out measurement, the report.

The validation images chose the best of many trials, which therefore looks better on them than it is. A held-out split
has no part in the choice and is measured once, at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from sam3lora.errors import UserError
from sam3lora.files import write_whole
from sam3lora.model.adapter.metadata import current_versions
from sam3lora.tune.report.sweep_page import render_sweep
from sam3lora.tune.report.tables import copy_best, write_tables
from sam3lora.tune.run.checks import held_out_split
from sam3lora.tune.run.click_held_out import measure_click_held_out
from sam3lora.tune.run.dense_held_out import measure_dense_held_out
from sam3lora.tune.run.held_out import measure_held_out
from sam3lora.tune.run.ledger import Ledger, TrialRecord
from sam3lora.tune.run.trial_summary import num_images
from sam3lora.tune.space.search_space import SearchSpace

REPORT_FILE = "sweep.html"
_MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "detection": measure_held_out,
    "dense": measure_dense_held_out,
    "clicks": measure_click_held_out,
}

logger = logging.getLogger(__name__)


def write_outcome(
    space: SearchSpace,
    ledger: Ledger,
    *,
    best: TrialRecord | None,
    base: TrialRecord | None,
    summary: dict[str, Any],
    address: str | None = None,
) -> dict[str, Any]:
    """Write it all, and return the completed summary."""
    sweep_dir, records, rejections = ledger.sweep_dir, ledger.records(), ledger.rejections()
    summary = {
        "name": space.name,
        "sweep_dir": str(sweep_dir),
        "metric": space.search.metric,
        "mode": space.search.mode,
        "algorithm": space.search.algorithm,
        "num_trials": space.num_trials,
        "best": best.number if best else None,
        "base": base.number if base else None,
        "best_value": best.value if best else None,
        "base_value": base.value if base else None,
        "best_settings": best.values if best else None,
        "counts": {
            status: sum(record.status == status for record in records) for status in ("finished", "stopped", "failed")
        }
        | {"rejected": len(rejections)},
        "vision": {
            "passes": sum(record.vision_passes for record in records),
            "features_loaded": sum(record.features_loaded for record in records),
            "images": max((num_images(ledger.folder(record.number)) or 0 for record in records), default=0) or None,
        },
        "versions": current_versions(),
        "held_out": None,
        **summary,
    }
    write_tables(sweep_dir, records, list(space.parameters), rejections)
    if best is not None:
        copy_best(sweep_dir, best, space.config_of(best.values, space.best_adapter_keys()))
    write_whole(sweep_dir / REPORT_FILE, render_sweep(space, records, rejections, summary))
    if best is not None:
        summary["held_out"] = _held_out(space, ledger, best, base, address)
        write_whole(sweep_dir / REPORT_FILE, render_sweep(space, records, rejections, summary))
    return summary


def _held_out(
    space: SearchSpace, ledger: Ledger, best: TrialRecord, base: TrialRecord | None, address: str | None
) -> dict[str, Any] | None:
    """The measurement of the best adapter on the held-out split, or its `split` and why it failed; None without one.

    On a cluster a Ray worker measures it, as the driver's host may have no GPU.
    """
    on_cluster = bool(address or os.environ.get("RAY_ADDRESS"))
    try:
        split = held_out_split(space)
        if split is None:
            return None
        return _MEASURES[space.base.task](
            split,
            ledger.folder(base.number) / "best" if base else None,
            ledger.folder(best.number) / "best",
            space.config_of(best.values),
            metric=space.search.metric,
            num_workers=1 if on_cluster else 0,
            address=address,
        )
    except (UserError, RuntimeError) as error:  # a fault in these images must not cost the results of the sweep
        logger.warning("the held-out split %s was not measured: %s", space.search.held_out_split, error)
        return {"split": space.search.held_out_split, "failure": str(error)}
