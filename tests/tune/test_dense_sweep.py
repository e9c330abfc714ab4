"""Sweeps of task dense: what may be searched, how large an adapter is, and the measurement on a held-out split."""

from __future__ import annotations

import shutil

import pytest
import torch

from sam3lora.config import load_config
from sam3lora.data.coco import ANNOTATION_FILE, merge_names
from sam3lora.data.split_files import SplitFiles
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.dense_run import evaluate_dense
from sam3lora.model.loading import load_base
from sam3lora.training.task import task_of
from sam3lora.tune.estimate.dense_size import num_kept_layers
from sam3lora.tune.estimate.parameter_budget import adapted_modules, count_trainable, trunk_of
from sam3lora.tune.estimate.sweep_cost import why_not_kept
from sam3lora.tune.run.checks import check_data
from sam3lora.tune.run.dense_held_out import measure_dense_held_out
from sam3lora.tune.space.reader import load_space

from ..model.dense.dense_cases import write_dense
from .made_sweeps import text_of, trial

WIDTHS = {"dense.width": {"choice": [32, 64]}}


def space_of(parameters, **keys):
    return load_space({"base": "dense_quick_test", "parameters": parameters} | keys)


def test_trials_are_compared_by_mean_iou(data_dir):
    space = space_of(WIDTHS, set={"training.data_dir": str(data_dir)})
    assert (space.search.metric, space.search.mode) == ("mean_iou", "max")
    trial = space.trial_config({"dense.width": 32}, "trial")
    assert (trial.evaluation.best_metric, trial.evaluation.every_epochs) == ("mean_iou", 1)
    assert check_data(space).train
    assert load_space(space.to_dict()) == space
    assert space_of(WIDTHS, search={"metric": "valid_loss"}).search.metric == "valid_loss"


@pytest.mark.parametrize(
    ("parameters", "search", "words"),
    [
        (WIDTHS, {"metric": "map"}, "not measured with task dense"),
        ({"dense.mode": {"choice": ["binary", "multiclass"]}}, {}, "do not compare"),
        ({"dense.foreground": {"choice": [["crack"], ["rust"]]}}, {}, "do not compare"),
        ({"dense.threshold": {"uniform": [0.2, 0.8]}}, {}, "under set"),
        ({"task": {"choice": ["dense", "detection"]}}, {}, "different tasks"),
        ({"dense.boundary_weight": {"uniform": [0, 5]}}, {"metric": "valid_loss"}, "mean_iou"),
        ({"dense.width": {"choice": [32, 33]}}, {}, "multiple of 32"),
        ({"training.loss.mask": {"uniform": [1, 5]}}, {}, "no effect"),
    ],
)
def test_what_a_sweep_cannot_compare(parameters, search, words):
    with pytest.raises(UserError, match=words):
        space_of(parameters, search=search)


def test_the_metric_of_labels_is_not_one_of_prompts():
    with pytest.raises(UserError, match="not measured with task detection"):
        space_of({"lora.rank": {"choice": [4, 8]}}, base="quick_test", search={"metric": "mean_iou"})


def test_ways_of_adapting_the_trunk_are_searched():
    # The section lora would have no effect on the others, which a configuration refuses.
    space = space_of({"dense.adapter": {"choice": ["lora", "bottleneck", "none"]}})
    configs = {name: space.config_of({"dense.adapter": name}) for name in ("lora", "bottleneck", "none")}
    assert {name: config.lora.components for name, config in configs.items()} == {
        "lora": ("vision_encoder",),
        "bottleneck": (),
        "none": (),
    }
    # It cannot be left out where it is searched.
    with pytest.raises(UserError, match=r"lora has no effect while dense\.adapter is none"):
        space.config_of({"dense.adapter": "none", "lora.rank": 2})


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], 0),
        (["dense.layers=last", "lora.vision_last_layers=1"], 1),
        (["lora={}", "dense.adapter=bottleneck", "dense.bottleneck_width=8"], 0),
        (["lora={}", "dense.adapter=none", "dense.layers=[0, 1]", "dense.norm=batch"], 2),
        (["lora={}", "dense.adapter=none", "dense.mode=binary", "dense.layers=[0]", "dense.width=96"], 1),
    ],
)
def test_sizes_are_those_of_the_model(small_base, data_dir, overrides, kept):
    base = [f"model.name={small_base}", f"training.data_dir={data_dir}"]
    config = load_config("dense_quick_test", [*base, *overrides])
    loaded, task = load_base(str(small_base)), task_of(config)
    data = task.load_data(config, loaded.resolution, loaded.patch_size)
    model, _ = task.build(config, loaded, data, torch.device("cpu"))
    assert count_trainable(config) == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert num_kept_layers(config, adapted_modules(config), trunk_of(config)) == len(model.constant_layers) == kept
    assert (why_not_kept(config) is None) == (kept > 0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> SplitFiles:
    folder = write_dataset(tmp_path_factory.mktemp("data") / "data", num_train=1, num_valid=3, size=112, seed=11)
    return SplitFiles("test", folder / "valid" / ANNOTATION_FILE, folder / "valid")


def test_held_out_images_compare_best_and_base_configuration(small_base, held_out, tmp_path):
    names = merge_names([held_out.read("stop")])[:2]
    classes = {"mode": "multiclass", "classes": ("background", *names)}
    base = write_dense(small_base, tmp_path / "base", **classes)
    best = write_dense(small_base, tmp_path / "best", **classes, lora=False)
    config = load_config("dense_quick_test", [f"model.name={small_base}"])
    found = measure_dense_held_out(held_out, base, best, config)
    alone = {name: evaluate_dense(held_out, folder).values for name, folder in (("base", base), ("best", best))}
    assert (found["split"], found["num_images"], found["metric"]) == ("test", 3, "mean_iou")
    assert {name: found[name] for name in alone} == {name: values["mean_iou"] for name, values in alone.items()}
    assert found["difference"] == pytest.approx(found["best"] - found["base"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert found["models"]["best trial"]["boundary_iou"] == alone["best"]["boundary_iou"]

    same = measure_dense_held_out(held_out, best, best, config, metric="valid_loss")
    assert (same["base"], same["difference"]) == (same["best"], None)
    assert "itself the best" in same["note"]
    single = measure_dense_held_out(held_out, None, best, config)
    assert (single["base"], single["best"], list(single["models"])) == (None, found["best"], ["best trial"])


def test_held_out_images_that_cannot_be_read_are_left_out_and_told(small_base, held_out, tmp_path):
    folder = shutil.copytree(held_out.image_dir, tmp_path / "test")
    split = SplitFiles("test", folder / ANNOTATION_FILE, folder)
    first = sorted(folder.glob("*.jpg"))[0]
    first.write_bytes(first.read_bytes()[:300])
    names = merge_names([split.read()])[:2]
    run = write_dense(small_base, tmp_path / "run", mode="multiclass", classes=("background", *names))
    config = load_config("dense_quick_test", [f"model.name={small_base}"])
    with pytest.raises(UserError, match=rf"1 of 3 images cannot be read.*{first.name}.*training\.on_bad_image=skip"):
        measure_dense_held_out(split, None, run, config)
    found = measure_dense_held_out(split, None, run, config.changed({"training.on_bad_image": "skip"}))
    assert found["num_images"] == 2
    (told,) = [fault for fault in found["faults"] if fault["kind"] == "skipped_image"]
    assert (told["split"], told["count"], told["leaves_out"]) == ("test", 1, "images")
    assert first.name in told["examples"][0]


def test_the_report_speaks_of_labels():
    space = space_of(WIDTHS)
    records = [trial(0, 0.5, dense__width=64), trial(1, 0.6, dense__width=32)]
    shown = {"base configuration": {"mean_iou": 0.41}, "best trial": {"mean_iou": 0.52, "pixel_accuracy": 0.93}}
    held_out = {"split": "test", "num_images": 9, "metric": "mean_iou", "base": 0.41, "best": 0.52, "models": shown}
    text = text_of(space, records, held_out=held_out)
    for said in ("mean IoU 0.600 instead of 0.500", "On the 9 held-out images of test: mean IoU 0.520", "0.520 0.930"):
        assert said in text
    assert "sam3lora infer" in text
    assert "--prompt" not in text
