"""The measurement on a held-out split."""

from __future__ import annotations

from pathlib import Path

import pytest

import serve_app
from sam3lora.config import Config, load_config
from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.data.split_files import SplitFiles
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.errors import UserError
from sam3lora.tune.run import held_out as module
from sam3lora.tune.run.checks import held_out_split
from sam3lora.tune.run.held_out import measure_held_out
from sam3lora.tune.space.reader import load_space

SAMPLES = Path(serve_app.__file__).parent / "samples"
PARTS, LIGHT = SAMPLES / "parts", SAMPLES / "parts-light"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Three drawn scenes of what the sample adapters were trained on, as the split test/."""
    folder = write_dataset(tmp_path_factory.mktemp("data") / "data", num_train=1, num_valid=3, seed=11, progress=False)
    return (folder / "valid").rename(folder / "test")


def make_config(held_out) -> Config:
    return load_config("demo", [f"training.data_dir='{held_out.parent}'", "evaluation.num_samples=2"])


def as_split(folder: Path) -> SplitFiles:
    return SplitFiles(folder.name, folder / ANNOTATION_FILE, folder)


@pytest.fixture
def config(held_out) -> Config:
    return make_config(held_out)


@pytest.fixture(scope="module")
def measured(held_out):
    """The metrics of all models on three images, and of two on one image; measured once, as that takes long."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        real = module.evaluate_models

        def remember(split, models, settings, **options):
            found = real(split, models, settings, **options)
            seen.setdefault(settings.num_samples, {}).update(zip(models.labels, found, strict=True))
            return found

        patch.setattr(module, "evaluate_models", remember)
        config = make_config(held_out)
        best = measure_held_out(as_split(held_out), LIGHT, PARTS, config)
        single = measure_held_out(as_split(held_out), None, PARTS, config, metric="cgf1", num_samples=1)
    return {"best": best, "single": single, "metrics": seen}


@pytest.fixture
def again(measured, monkeypatch):
    """Answers with what `measured` has found."""

    def answer(split, models, settings, **options):
        return [measured["metrics"][settings.num_samples][label] for label in models.labels]

    monkeypatch.setattr(module, "evaluate_models", answer)


def test_best_trial_against_the_base_configuration(measured):
    found = measured["best"]
    assert (found["split"], found["metric"], found["compared_with"]) == ("test", "map", "base configuration")
    assert found["num_images"] == 3  # all, whatever the trials were measured on
    models = found["models"]
    assert list(models) == ["plain model", "base configuration", "best trial"]
    assert all(list(values) == ["map", "map_50", "cgf1", "off_prompt_fpr"] for values in models.values())
    # what the adapters learned, and the larger one better
    assert models["plain model"]["map"] < models["base configuration"]["map"] < models["best trial"]["map"]
    assert found["base"] == models["base configuration"]["map"]
    assert found["best"] == models["best trial"]["map"]
    assert found["difference"] == pytest.approx(found["best"] - found["base"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["note"] == ""


def test_the_base_configuration_can_be_the_best(held_out, config, again):
    found = measure_held_out(as_split(held_out), LIGHT, SAMPLES / "parts" / ".." / "parts-light", config)
    assert (found["base"], found["difference"], found["low"], found["high"]) == (found["best"], 0, 0, 0)
    assert "itself the best" in found["note"]
    assert list(found["models"]) == ["plain model", "best trial", "base configuration"]


def test_without_an_adapter_of_the_base_configuration(measured):
    found = measured["single"]
    assert (found["metric"], found["compared_with"]) == ("cgf1", "plain model")
    assert found["base"] == found["models"]["plain model"]["cgf1"]
    assert list(found["models"]) == ["plain model", "best trial"]
    assert found["num_images"] == 1
    # the image shows everything that is asked for, and cgF1 needs what is absent
    assert (found["base"], found["difference"], found["low"]) == (None, None, None)
    assert "cgf1 cannot be measured" in found["note"]


def test_validation_loss_is_compared_by_map(held_out, config, again):
    found = measure_held_out(as_split(held_out), None, PARTS, config, metric="valid_loss", num_samples=1)
    assert found["metric"] == "map"
    assert found["difference"] == found["best"] - found["base"]
    assert found["low"] is None
    assert "too few for an interval" in found["note"]


def test_no_such_split(tmp_path):
    space = load_space("lora_quick", overrides=[f"training.data_dir={tmp_path}"])
    assert held_out_split(space) is None
    (tmp_path / "test").mkdir()  # images that nobody has annotated
    with pytest.raises(UserError, match=r"no annotation file .*test"):
        held_out_split(space)


def test_damaged_split(tmp_path, config):
    (tmp_path / "_annotations.coco.json").write_text("{")
    with pytest.raises(UserError, match=r"_annotations\.coco\.json"):
        measure_held_out(as_split(tmp_path), None, PARTS, config)
