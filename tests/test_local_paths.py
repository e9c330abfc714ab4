"""Addresses in place of paths, and what a relative path means to workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sam3lora import evaluate, load_config, train
from sam3lora.cli.argv import refuse_bad_paths
from sam3lora.config.keys import known_keys
from sam3lora.errors import UserError
from sam3lora.files import cache_folder
from sam3lora.inference.batch.job import ModelChoice, predict_batch
from sam3lora.local_paths import absolute_base, path_problem
from sam3lora.model.base_folder import find_base
from sam3lora.tune.run.sweep import run_sweep
from serve_app.settings import AdapterSettings

S3 = "s3://bucket//run"
MASKS = {"lora": {"apply_to_mask_decoder": True}}


@pytest.mark.parametrize("address", [S3, "gs://b/x", "hdfs://host/x", "file:///tmp/x", "https://example.org/a.jpg"])
def test_an_address_is_shown_as_typed(address):
    assert address in str(path_problem(address))


def test_an_address_that_has_lost_a_slash_to_a_path_is_one():
    assert "s3://bucket/run is" in str(path_problem(Path("s3://bucket/run")))


@pytest.mark.parametrize("path", ["runs/s3", "/shared/a:b/c", "C:/runs", "../x", "facebook/sam3", "a b", "s3:"])
def test_a_path_is_none(path):
    assert path_problem(path) is None


PATH_KEYS = {"model.name", "training.data_dir", "training.cache_dir", "output.output_dir", "data.annotation_file"}


def test_every_key_of_a_path_is_covered():
    # a new key that holds a folder or a file belongs in the list, and gets the type LocalPath
    assert {key for key in known_keys() if key.endswith(("_dir", "_file", "model.name", "_folder"))} == PATH_KEYS


@pytest.mark.parametrize("key", sorted(PATH_KEYS))
def test_keys_refuse_addresses_by_name(key):
    with pytest.raises(UserError, match=rf"{key}: {S3} is an address.*Mount"):
        load_config(MASKS, [f"{key}={S3}"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "light", "--output-dir", S3], "--output-dir"),
        (["validate", f"--val_data_dir={S3}"], "--val-data-dir"),
        (["validate", "--weights", "a", S3], "--weights"),
        (["tune", S3], "the argument"),
        (["serve", "--adapters", S3], "--adapters"),
    ],
)
def test_options_refuse_addresses_by_name(words, name):
    with pytest.raises(UserError, match=rf"^{name}: {S3} is"):
        refuse_bad_paths(words)


def test_clusters_prompts_and_keys_pass():
    refuse_bad_paths(["train", "light", "--address", "ray://host:1", "output.output_dir=s3://x", "--device", "0"])
    refuse_bad_paths(["infer", "--prompt", "a sign that says http://x"])


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluate(S3),
        lambda: find_base(S3),
        lambda: predict_batch("images", Path("s3://bucket/out"), ["crack"]),
        lambda: predict_batch(S3, "out", ["crack"]),
        lambda: predict_batch("images", "out", ["crack"], choice=ModelChoice(adapter=S3)),
        lambda: run_sweep(None, S3),  # type: ignore[arg-type]
        lambda: AdapterSettings(root=Path("s3://bucket/adapters")),
    ],
)
def test_python_refuses_addresses_and_makes_no_folder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"s3://bucket.* is an address"):
        call()
    assert not os.listdir(tmp_path)


def test_the_cache_of_the_environment_is_no_address(monkeypatch):
    monkeypatch.setenv("SAM3LORA_CACHE", S3)
    with pytest.raises(UserError, match="SAM3LORA_CACHE"):
        cache_folder()


def test_relative_paths_mean_the_folder_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "base").mkdir()
    paths = {"training": {"data_dir": "data", "cache_dir": "~/cache"}, "output": {"output_dir": "run"}}
    config = load_config({**MASKS, **paths, "model": {"name": "base"}}).with_absolute_paths()
    assert config.model.name == f"{tmp_path}/base"
    assert config.training.data_dir == f"{tmp_path}/data"
    assert config.training.cache_dir == f"{tmp_path}/home/cache"
    assert config.output.output_dir == f"{tmp_path}/run"


def test_names_of_bases_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # the built-in model wins, as in find_base
    assert absolute_base("tiny") == "tiny"
    assert absolute_base("facebook/sam3") == "facebook/sam3"
    (tmp_path / "facebook" / "sam3").mkdir(parents=True)
    assert absolute_base("facebook/sam3") == f"{tmp_path}/facebook/sam3"


def test_workers_and_adapters_get_absolute_paths(tmp_path, monkeypatch):
    from sam3lora.training import launch

    monkeypatch.chdir(tmp_path)
    for name in ("base", "data"):
        (tmp_path / name).mkdir()
    payloads = []

    def run(config, payload, *_):
        payloads.append(payload)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_run", run)
    keys = ["model.name=base", "training.data_dir=data", "training.cache_dir=cache", "output.output_dir=run"]
    with pytest.raises(KeyboardInterrupt):
        train(load_config(MASKS, keys))
    (config,) = (payload["config"] for payload in payloads)
    assert config["model"]["name"] == f"{tmp_path}/base"
    assert config["training"]["cache_dir"] == f"{tmp_path}/cache"
    assert config["training"]["data_dir"] == f"{tmp_path}/data"
    assert load_config(str(tmp_path / "run" / "config.yaml")).model.name == f"{tmp_path}/base"


def test_the_home_of_an_unknown_user_is_told():
    with pytest.raises(UserError, match=r"--output: ~nobody-here/run"):
        refuse_bad_paths(["validate", "--output", "~nobody-here/run"])
    assert path_problem("~/run") is None
