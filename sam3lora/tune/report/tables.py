"""What a sweep leaves for programs and for the next run: the tables of its trials, and the best adapter."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sam3lora.errors import UserError
from sam3lora.files import replace_folder, sync_files
from sam3lora.tune.run.ledger import Ledger, Rejection, TrialRecord
from sam3lora.tune.space.parameters import is_number, value_text

if TYPE_CHECKING:
    from sam3lora.config import Config

CSV_FILE, PARQUET_FILE, BEST_FOLDER, CONFIG_FILE = "trials.csv", "trials.parquet", "best", "config.yaml"
REJECTED = "rejected"
_BYTES_PER_PARAMETER = 4

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
    """Write ``trials.csv`` and ``trials.parquet``, each whole or not at all: a row for each trial, then the rejected.

    Columns: number, status ("rejected" for samples that were never trained), is_base, value, each parameter under its
    own name, ``metrics.NAME``, trainable_parameters, adapter_mb (10^6 bytes), epochs, best_epoch, seconds,
    images_per_second, memory_mb, vision_passes, features_loaded, failure (kind of failure or of rejection), reason,
    retries (how many). Numbers are numbers; a parameter that also has other values is text, and a list its entries
    with commas. What is not known is empty. In the CSV file, text that a spreadsheet would run as a formula has an
    apostrophe in front.

    Returns:
        Both files.
    """
    table = _table(records, list(parameters), rejections)
    csv, parquet = sweep_dir / CSV_FILE, sweep_dir / PARQUET_FILE
    _replace(csv, lambda path: pa.csv.write_csv(_without_formulas(table), path))
    _replace(parquet, lambda path: pa.parquet.write_table(table, path))
    return csv, parquet


def copy_best(sweep_dir: Path, record: TrialRecord | None, config: Config) -> Path | None:
    """Make ``best/`` of a trial's adapter, with the ``config.yaml`` to train it again; an older one is replaced whole.

    Args:
        sweep_dir: The sweep's folder.
        record: The best trial. None, or one without a value: an older ``best/`` stays.
        config: The trial's settings in all else as the base has them (`SearchSpace.config_of`). A batch that was made
            smaller for want of memory goes into ``config.yaml`` as it was trained.

    Returns:
        The folder; None if nothing was copied.

    Raises:
        UserError: The trial's adapter is not there.
    """
    from sam3lora.model.adapter.folder import is_adapter_folder

    if record is None or record.value is None:
        return None
    adapter, target = Ledger(sweep_dir).folder(record.number) / "best", sweep_dir / BEST_FOLDER
    if not is_adapter_folder(adapter):
        raise UserError(f"{adapter} holds no adapter, though trial {record.number} is recorded as the best: remove the "
                        f"folder {adapter.parent} and resume the sweep to have the trial done again")  # fmt: skip
    scratch = sweep_dir / f".{BEST_FOLDER}.{uuid.uuid4().hex}.tmp"
    scratch.mkdir()
    try:
        for file in adapter.iterdir():
            if file.is_file():
                shutil.copy(file, scratch)
        (scratch / CONFIG_FILE).write_text(_to_train_again(sweep_dir, record, config).to_yaml(), encoding="utf-8")
        sync_files(scratch)
        replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def adapter_mb(trainable_parameters: int) -> float:
    """Size of an adapter's weights in 10^6 bytes: 32 bits a parameter."""
    return _BYTES_PER_PARAMETER * trainable_parameters / 1e6


def _to_train_again(sweep_dir: Path, record: TrialRecord, config: Config) -> Config:
    training: dict[str, Any] = {}
    for retry in record.retries:
        training |= {name: retry[name] for name in ("batch_size", "gradient_accumulation_steps") if name in retry}
    if config.training.data_dir is not None:
        training["data_dir"] = str(Path(config.training.data_dir).expanduser().absolute())
    output = {"output_dir": str((sweep_dir / "retrained").absolute())}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "output": config.output.model_copy(update=output),
        }
    )


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
        "status": REJECTED,
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
    """Text that begins as a formula does, quoted (https://owasp.org/www-community/attacks/CSV_Injection)."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            quoted = [_quoted(text) for text in table.column(place).to_pylist()]
            table = table.set_column(place, field, pa.array(quoted, pa.string()))
    return table


def _quoted(text: str | None) -> str | None:
    if text is None or not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
