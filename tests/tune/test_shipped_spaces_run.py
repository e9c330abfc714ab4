"""Every shipped search space, for two trials on the tiny model."""

import json

import pytest
import ray
import yaml

from sam3lora.config import load_config
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.tune.run.sweep import run_sweep
from sam3lora.tune.space.reader import load_space, space_names

SHORT = ("training.num_epochs=1", "training.max_steps=2", "scaling.num_workers=0")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=4, num_valid=4)
    return folder


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    yield
    ray.shutdown()


def run(name, data_dir, folder, *overrides, **options):
    space = load_space(
        name, config="quick_test", overrides=[f"training.data_dir={data_dir}", *SHORT, *overrides], **options
    )
    return run_sweep(space, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", space_names())
def test_every_shipped_space_runs_and_leaves_its_files(name, data_dir, tmp_path):
    result = run(name, data_dir, tmp_path / "sweep", num_trials=2)
    assert [record.status for record in result.records] == ["finished", "finished"]
    assert result.report.is_file()
    visible = {path.name for path in result.sweep_dir.iterdir() if not path.name.startswith(".")}
    assert visible >= {"space.yaml", "trials", "trials.csv", "trials.parquet", "best", "sweep.json", "sweep.html"}
    best = result.sweep_dir / "best"
    assert {path.name for path in best.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "config.yaml"}
    assert load_config(best / "config.yaml").lora.rank == result.best.values.get("lora.rank", 8)
    assert json.loads((result.sweep_dir / "sweep.json").read_text())["best"] == result.best.number
    assert yaml.safe_load((result.sweep_dir / "space.yaml").read_text())["base_name"] == "quick_test"


@pytest.mark.slow
def test_optuna_learns_from_trials_of_two_sizes(data_dir, tmp_path):
    space = tmp_path / "sizes.yaml"
    space.write_text(
        "base: quick_test\n"
        "parameters:\n  lora.rank: {choice: [2, 4, 8]}\n  training.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}\n"
        "search: {algorithm: optuna, objective: quality_and_size, metric: valid_loss, num_trials: 4}\n"
    )
    result = run(str(space), data_dir, tmp_path / "sweep")
    assert [record.status for record in result.records] == ["finished"] * 4
    assert len({json.dumps(record.values) for record in result.records}) == 4
