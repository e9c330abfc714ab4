"""The tables of a sweep keep numbers as numbers; best/ is an adapter that can be used and trained again."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from sam3lora.config import load_config
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder import check_adapter_folder
from sam3lora.training.launch import train
from sam3lora.tune.report.tables import copy_best, write_tables
from sam3lora.tune.run.ledger import Ledger, Rejection, TrialRecord

from .made_sweeps import draw_rejections, draw_trials, make_space, trial

FILES = ("adapter_config.json", "adapter_model.safetensors", "sam3lora.json", "README.md")


def read(folder: Path, records: list[TrialRecord], parameters: list[str], rejections=()) -> pa.Table:
    csv, parquet = write_tables(folder, records, parameters, list(rejections))
    table = pa.parquet.read_table(parquet)
    assert pa.csv.read_csv(csv).column_names == table.column_names
    assert sorted(path.name for path in folder.iterdir()) == ["trials.csv", "trials.parquet"]
    return table


def test_rows_of_both_files(tmp_path):
    assert read(tmp_path, [], ["lora.rank"]).num_rows == 0
    space = make_space()
    records, rejections = draw_trials(space, 12), draw_rejections(space, 2)
    table = read(tmp_path, records, list(space.parameters), rejections)
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == [record.status for record in records] + ["rejected"] * 2
    for row, record in zip(rows, records):
        assert row["number"] == record.number
        assert row["value"] == record.value
        assert row["lora.rank"] == record.values["lora.rank"]
        assert row["lora.target_modules"] == ", ".join(record.values["lora.target_modules"])
        assert row["metrics.map"] == record.metrics.get("map")
        assert row["adapter_mb"] == pytest.approx(4e-6 * record.trainable_parameters)
        assert row["retries"] == len(record.retries)
    assert rows[0]["is_base"] is True
    assert rows[4]["failure"] == "loss not finite"
    assert (rows[-1]["failure"], rows[-1]["value"]) == ("over budget", None)
    # a program that reads the CSV finds numbers, too
    from_csv = pa.csv.read_csv(tmp_path / "trials.csv")
    for name in ("value", "lora.rank", "training.learning_rate", "metrics.map", "seconds", "number"):
        assert from_csv.column(name).to_pylist() == table.column(name).to_pylist()
    rejected = Rejection(1, {"lora.rank": 4}, "impossible settings", "no such module")
    (row,) = read(tmp_path, [], ["lora.rank"], [rejected]).to_pylist()
    assert (row["lora.rank"], row["adapter_mb"], row["reason"]) == (4, None, "no such module")


@pytest.mark.parametrize(
    ("values", "kind", "written"),
    [
        ([4, 8, None], pa.int64(), [4, 8, None]),
        ([1, 0.5], pa.float64(), [1.0, 0.5]),
        ([True, False], pa.bool_(), [True, False]),
        ([True, 3], pa.string(), ["true", "3"]),
        (["a", None], pa.string(), ["a", None]),
        ([["q", "v"], "all"], pa.string(), ["q, v", "all"]),
        ([{"decoder": 0.5}], pa.string(), ["decoder: 0.5"]),
        ([None], pa.string(), [None]),
    ],
)
def test_types_of_parameters(tmp_path, values, kind, written):
    table = read(tmp_path, [trial(number, 0.1, x=value) for number, value in enumerate(values)], ["x"])
    assert table.schema.field("x").type == kind
    assert table.column("x").to_pylist() == written


def test_text_is_no_formula_in_a_spreadsheet(tmp_path):
    begins = ["=1+1", "+x", "-x y", "@a", "\tb", "\rc", "-3", "a=b"]
    records = [replace(trial(n, -0.5, x=text), status="failed", reason=text) for n, text in enumerate(begins)]
    records.append(trial(len(begins), -0.5, x=True))
    rejected = Rejection(20, {"x": "=cmd()"}, "impossible settings", "=cmd()")
    table = read(tmp_path, records, ["x"], [rejected])
    assert table.column("x").to_pylist() == [*begins, "true", "=cmd()"]
    assert table.column("reason").to_pylist() == [*begins, None, "=cmd()"]
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("x", "reason"):
        written = [row[name] for row in rows]
        assert written[:6] == [f"'{text}" for text in begins[:6]]
        assert written[6:8] == begins[6:]
        assert written[-1] == "'=cmd()"
    assert [row["value"] for row in rows[:-1]] == ["-0.5"] * len(records)


def make_adapter(sweep_dir: Path, number: int, mark: str) -> None:
    folder = Ledger(sweep_dir).folder(number) / "best"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(json.dumps(mark))


def test_best_is_the_adapter_and_a_configuration_that_loads(tmp_path, monkeypatch):
    """The batch is as it was trained, and the data is found from anywhere."""
    monkeypatch.chdir(tmp_path)
    space = make_space()
    record = draw_trials(space, 2)[1]
    record.retries = [
        {"reason": "out of memory", "batch_size": 2, "gradient_accumulation_steps": 2},
        {"reason": "out of memory", "batch_size": 1, "gradient_accumulation_steps": 4},
    ]
    make_adapter(tmp_path, 1, "one")
    step = {"training.batch_size": 4, "training.images_per_step": None}
    config = space.config_of(record.values).changed({"training.data_dir": "data", **step})
    folder = copy_best(tmp_path, record, config)
    assert folder == tmp_path / "best"
    assert {path.name for path in folder.iterdir()} == {*FILES, "config.yaml"}
    assert json.loads((folder / "sam3lora.json").read_text()) == "one"
    again = load_config(folder / "config.yaml")
    assert (again.lora, again.logging, again.evaluation) == (config.lora, space.base.logging, space.base.evaluation)
    changes = {"batch_size": 1, "gradient_accumulation_steps": 4, "data_dir": str(tmp_path / "data")}
    assert again.training == config.changed({f"training.{key}": value for key, value in changes.items()}).training
    assert not Path(again.output.output_dir).exists()
    assert Path(again.output.output_dir).is_absolute()


def test_an_older_best_is_replaced_whole_and_stays_when_there_is_no_other(tmp_path):
    config = load_config("light")
    for number, mark in ((1, "one"), (2, "two")):
        make_adapter(tmp_path, number, mark)
        copy_best(tmp_path, trial(number, 0.1), config)
        if mark == "one":
            (tmp_path / "best" / "left over").touch()
    assert copy_best(tmp_path, None, config) is None
    assert copy_best(tmp_path, trial(3, None), config) is None
    with pytest.raises(UserError, match="trial 3 is recorded as the best"):
        copy_best(tmp_path, trial(3, 0.9), config)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {*FILES, "config.yaml"}
    assert json.loads((tmp_path / "best" / "sam3lora.json").read_text()) == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "trials"]


@pytest.mark.slow
def test_best_trains_again(tmp_path):
    data = write_dataset(tmp_path / "data", num_train=2, num_valid=1, progress=False)
    short = ["training.max_steps=1", f"training.data_dir={data}", "scaling.num_workers=0", "logging.plots=false"]
    base = load_config("quick_test", short)
    run = Ledger(tmp_path / "sweep").folder(3)
    train(load_config(base.model_dump(), [f"output.output_dir={run}", "training.save_total_limit=1"]))
    folder = copy_best(tmp_path / "sweep", trial(3, 0.5), base)
    check_adapter_folder(folder)
    again = train(load_config(folder / "config.yaml"))
    assert again.steps == 1
    check_adapter_folder(again.best_adapter)
    assert again.output_dir not in (run, folder)
