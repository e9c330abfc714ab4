"""Optional packages are looked for before a run begins, and no preset needs one."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

from sam3lora import load_config, train
from sam3lora.config import preset_names
from sam3lora.errors import UserError
from sam3lora.extras import check_extras

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
MASKS = {"lora": {"apply_to_mask_decoder": True}}


@pytest.fixture
def plain_install(monkeypatch):
    """What `pip install sam3lora` lacks cannot be found."""
    find_spec = importlib.util.find_spec

    def found(name, package=None):
        return None if name in ("tensorboard", "bitsandbytes", "optuna") else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.mark.parametrize("name", preset_names())
def test_presets_need_no_extra(name, plain_install):
    check_extras(load_config(name))


@pytest.mark.parametrize(
    ("setting", "extra"), [("logging.tensorboard=true", "tensorboard"), ("model.quantization=nf4", "quantization")]
)
def test_a_missing_package_ends_a_run_before_it_writes(setting, extra, plain_install, tmp_path):
    (tmp_path / "data").mkdir()
    paths = [f"training.data_dir={tmp_path / 'data'}", f"output.output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=rf"{setting.partition('=')[0]}.*pip install 'sam3lora\[{extra}\]'"):
        train(load_config(MASKS, [setting, *paths]))
    assert not (tmp_path / "run").exists()
    assert extra in PROJECT["optional-dependencies"]
