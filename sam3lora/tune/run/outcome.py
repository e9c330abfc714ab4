"""What a sweep leaves when its trials are over: tables, the best adapter, the held-out measurement, the report."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.model.adapter.metadata import current_versions
from sam3lora.tune.report.sweep_page import render_sweep
from sam3lora.tune.report.tables import copy_best, write_tables
from sam3lora.tune.run.held_out import measure_held_out
from sam3lora.tune.run.ledger import Ledger, TrialRecord
from sam3lora.tune.run.trial_summary import num_images
from sam3lora.tune.space.reader import SearchSpace

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
    """Write everything and return the summary."""
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
        copy_best(sweep_dir, best, _config_to_train_again(space, best))
    _write_page(sweep_dir, render_sweep(space, records, rejections, summary))
    if best is not None:
        summary["held_out"] = _held_out(space, ledger, best, base, address)
        _write_page(sweep_dir, render_sweep(space, records, rejections, summary))
    return summary


def _write_page(sweep_dir: Path, page: str) -> None:
    scratch = sweep_dir / ".sweep.html.tmp"
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, sweep_dir / "sweep.html")


def _config_to_train_again(space: SearchSpace, best: TrialRecord) -> Config:
    """The configuration of the best trial, which chooses its adapter as the trial did."""
    config, trial = space.config_of(best.values), space.trial_config(best.values, "unused").evaluation
    chosen = {"every_epochs": trial.every_epochs, "best_metric": trial.best_metric}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=chosen)})


def _held_out(
    space: SearchSpace, ledger: Ledger, best: TrialRecord, base: TrialRecord | None, address: str | None
) -> dict[str, Any] | None:
    """The best adapter on images that no trial was chosen by, if there are any.

    On a cluster a Ray worker measures it: the driver's host may have no GPU.
    """
    on_cluster = bool(address or os.environ.get("RAY_ADDRESS"))
    split = space.search.held_out_split
    folder = space.base.training.required_data_dir() / split if split else None
    if folder is None or not folder.is_dir():
        return None
    try:
        return measure_held_out(
            folder,
            ledger.folder(base.number) / "best" if base else None,
            ledger.folder(best.number) / "best",
            space.config_of(best.values),
            metric=space.search.metric,
            num_workers=1 if on_cluster else 0,
            address=address,
        )
    except (UserError, RuntimeError) as error:  # what the sweep found is not lost to a fault in the test images
        logger.warning("the held-out split %s was not measured: %s", folder, error)
        return None
