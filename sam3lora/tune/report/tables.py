"""The tables of a sweep's trials, and the copy of its best adapter."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sam3lora.config import Config
from sam3lora.errors import UserError
from sam3lora.files import whole_file, whole_folder, write_whole
from sam3lora.model.adapter.folder import is_adapter_folder
from sam3lora.tune.run.ledger import Ledger, Rejection, TrialRecord
from sam3lora.tune.space.expressions import is_number
from sam3lora.tune.space.parameters import value_text
from sam3lora.tune.space.search_space import adapter_mb

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

_BEFORE = {"number": pa.int64(), "status": pa.string(), "is_base": pa.bool_(), "value": pa.float64()}
_AFTER = {
    "trainable_parameters": pa.int64(),
    "adapter_mb": pa.float64(),
    "epochs": pa.int64(),
    "best_epoch": pa.int64(),
    "seconds": pa.float64(),
    "images_per_second": pa.float64(),
    "memory_mb": pa.float64(),
    "vision_passes": pa.int64(),
    "features_loaded": pa.int64(),
    "failure": pa.string(),
    "reason": pa.string(),
    "retries": pa.int64(),
}


def write_tables(
    sweep_dir: Path, records: Sequence[TrialRecord], parameters: Iterable[str], rejections: Sequence[Rejection]
) -> tuple[Path, Path]:
    """Write `trials.csv` and `trials.parquet`, each whole or not at all: a row for each trial, then the rejected.

    Columns: number, status ("rejected" for samples that were never trained), is_base, value, each parameter under its
    own name, `metrics.NAME`, trainable_parameters, adapter_mb (10^6 bytes), epochs, best_epoch, seconds,
    images_per_second, memory_mb, vision_passes, features_loaded, failure (kind of failure or of rejection), reason,
    retries (how many). Numbers are numbers; a parameter that also has other values is text, and a list its entries
    with commas. Unknown values are empty. In the CSV file an apostrophe precedes text that a spreadsheet would run as
    a formula.
    """
    table = _table(records, list(parameters), rejections)
    csv, parquet = sweep_dir / "trials.csv", sweep_dir / "trials.parquet"
    with whole_file(csv) as scratch:
        pa.csv.write_csv(_without_formulas(table), scratch)
    with whole_file(parquet) as scratch:
        pa.parquet.write_table(table, scratch)
    return csv, parquet


def copy_best(sweep_dir: Path, record: TrialRecord | None, config: Config) -> Path | None:
    """Make `best/` of a trial's adapter and the `config.yaml` to train it again; an older `best/` is replaced whole.

    Without a trial that has a value an older `best/` stays, and the result is None. `config` comes from
    `SearchSpace.config_of`; `config.yaml` gets the batch of the last retry, if memory ran out.

    Raises:
        UserError: The trial's adapter is not there.
    """
    if record is None or record.value is None:
        return None
    adapter, target = Ledger(sweep_dir).folder(record.number) / "best", sweep_dir / "best"
    if not is_adapter_folder(adapter):
        raise UserError(f"{adapter} holds no adapter, though trial {record.number} is recorded as the best: remove the "
                        f"folder {adapter.parent} and resume the sweep to have the trial done again")  # fmt: skip
    changes: dict[str, Any] = {"output.output_dir": str((sweep_dir / "retrained").absolute())}
    if record.retries:
        names = ("batch_size", "gradient_accumulation_steps")
        changes |= {f"training.{name}": record.retries[-1][name] for name in names}
    if config.training.data_dir is not None:
        changes["training.data_dir"] = str(Path(config.training.data_dir).expanduser().absolute())
    with whole_folder(target) as scratch:
        for file in adapter.iterdir():
            if file.is_file():
                shutil.copy(file, scratch)
        write_whole(scratch / "config.yaml", config.changed(changes).to_yaml())
    return target


def _table(records: Sequence[TrialRecord], parameters: list[str], rejections: Sequence[Rejection]) -> pa.Table:
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    rows = [_trial_row(record) for record in records] + [_rejected_row(rejection) for rejection in rejections]
    values = [record.values for record in records] + [rejection.values for rejection in rejections]
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in _BEFORE.items()}
    columns |= {name: _parameter_column([entry.get(name) for entry in values]) for name in parameters}
    columns |= {
        f"metrics.{name}": pa.array([row.get("metrics", {}).get(name) for row in rows], pa.float64())
        for name in metrics
    }
    columns |= {name: pa.array([row.get(name) for row in rows], kind) for name, kind in _AFTER.items()}
    return pa.table(columns)


def _trial_row(record: TrialRecord) -> dict[str, Any]:
    row = {name: getattr(record, name, None) for name in (*_BEFORE, *_AFTER, "metrics")}
    return row | {"adapter_mb": adapter_mb(record.trainable_parameters), "retries": len(record.retries)}


def _rejected_row(rejection: Rejection) -> dict[str, Any]:
    size = rejection.trainable_parameters
    return {
        "number": rejection.number,
        "status": "rejected",
        "is_base": False,
        "trainable_parameters": size,
        "adapter_mb": None if size is None else adapter_mb(size),
        "failure": rejection.kind,
        "reason": rejection.reason,
    }


def _parameter_column(values: list[Any]) -> pa.Array:
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return pa.array(values, pa.bool_())
    if known and all(is_number(value) for value in known):
        return pa.array(values, pa.int64() if all(isinstance(value, int) for value in known) else pa.float64())
    return pa.array([None if value is None else value_text(value) for value in values], pa.string())


def _without_formulas(table: pa.Table) -> pa.Table:
    """Put an apostrophe before text that begins like a formula (https://owasp.org/www-community/attacks/CSV_Injection)."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            quoted = [_quoted(text) for text in table.column(place).to_pylist()]
            table = table.set_column(place, field, pa.array(quoted, pa.string()))
    return table


def _quoted(text: str | None) -> str | None:
    if text is None or not text.startswith(_FORMULA_STARTS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
