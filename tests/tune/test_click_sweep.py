"""Sweeps of task clicks: what may be searched and compared, how large an adapter is, and the held-out measurement."""

from __future__ import annotations

import io
from itertools import chain
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console

from sam3lora.config import load_config
from sam3lora.config.metrics import METRICS
from sam3lora.data.coco import ANNOTATION_FILE
from sam3lora.data.split_files import SplitFiles
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.click_run import evaluate_clicks
from sam3lora.evaluation.clicks.meter import ClickMeter
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.model.loading import load_base
from sam3lora.training.task import task_of
from sam3lora.tune.estimate.explain import explain_sweep
from sam3lora.tune.estimate.parameter_budget import count_trainable
from sam3lora.tune.estimate.sweep_cost import why_not_kept
from sam3lora.tune.run.click_held_out import measure_click_held_out
from sam3lora.tune.run.sweep import run_sweep
from sam3lora.tune.space.reader import load_space
from tests.model.clicks.click_adapters import write_click_adapter
from tests.model.clicks.click_bases import write_click_base

from .made_sweeps import text_of, trial

RANKS = {"lora.rank": {"choice": [2, 4]}}


def space_of(parameters, **keys):
    return load_space({"base": "clicks_quick_test", "parameters": parameters} | keys)


@pytest.fixture(scope="module")
def click_base(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_click_base(tmp_path_factory.mktemp("clicks") / "base", small_base)


def test_trials_are_compared_by_what_users_want():
    space = space_of(RANKS)
    assert (space.search.metric, space.search.mode) == ("mean_iou_3", "max")
    for metric, mode in (("noc_85", "min"), ("mean_iou_8", "max"), ("valid_loss", "min")):
        space = space_of(RANKS, search={"metric": metric})
        assert (space.search.metric, space.search.mode) == (metric, mode)
        assert space.trial_config({"lora.rank": 2}, "trial").evaluation.best_metric == metric
    assert load_space(space.to_dict()) == space


def test_explain_says_what_the_base_configuration_adapts():
    text = io.StringIO()
    explain_sweep(space_of(RANKS), console=Console(file=text, width=160), probe=False)
    assert "Base        clicks_quick_test (tiny): rank 8, alpha 16, on the click head\n" in text.getvalue()


def test_every_metric_of_the_task_is_measured():
    assert set(METRICS["clicks"]) <= ClickMeter().values().keys()
    names = list(chain(*METRICS.values()))
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("parameters", "search", "words"),
    [
        (RANKS, {"metric": "mean_iou"}, "not measured with task clicks: write valid_loss or mean_iou_3"),
        (
            {"clicks.iterations": {"choice": [1, 3]}},
            {"metric": "valid_loss"},
            "do not compare: choose metric mean_iou_3",
        ),
        ({"clicks.starts.box": {"uniform": [0, 1]}}, {"metric": "valid_loss"}, "do not compare"),
        ({"clicks.objects_per_image": {"choice": [4, 8]}}, {}, "which objects are measured"),
        ({"clicks.vision_adapter": {"choice": ["a", "b"]}}, {}, "under set"),
        ({"training.loss.mask": {"uniform": [1, 5]}}, {}, "no effect"),
    ],
)
def test_what_a_sweep_cannot_compare(parameters, search, words):
    with pytest.raises(UserError, match=words):
        space_of(parameters, search=search)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("lora.target_modules=[transformer]", "lora.use_dora=true"),
        ("lora.target_modules=[q_proj, output_hypernetworks_mlps]", "lora.rank=3", "model.resolution=224"),
    ],
)
def test_sizes_are_those_of_the_model(click_base, data_dir, overrides):
    base = (f"model.name={click_base}", f"training.data_dir={data_dir}", "model.resolution=null")
    config = load_config("clicks_quick_test", [*base, *overrides])
    loaded, task = load_base(str(click_base), resolution=config.model.resolution), task_of(config)
    data = task.load_data(config, loaded.resolution, loaded.patch_size)
    model, _ = task.build(config, loaded, data, torch.device("cpu"))
    assert count_trainable(config) == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert why_not_kept(config) is None


def test_the_size_of_sam_3s_is_known_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert count_trainable(load_config("clicks")) == 335_872  # 336 k in docs/clicks_training.md


@pytest.mark.slow
def test_held_out_images_compare_best_base_and_plain_model(tmp_path):
    data = write_dataset(tmp_path / "data", num_train=1, num_valid=2, size=112, seed=11)
    held_out = SplitFiles("test", data / "valid" / ANNOTATION_FILE, data / "valid")
    base, best = (write_click_adapter(tmp_path / str(seed), "tiny", seed=seed, std=0.1) for seed in (1, 2))
    config = load_config("clicks_quick_test")
    found = measure_click_held_out(held_out, base, best, config, metric="noc_85")
    assert (found["split"], found["num_images"], found["metric"]) == ("test", 2, "noc_85")
    alone = evaluate_clicks(held_out, None, ClickEvaluation(start_from=None), click_adapter=best).alone
    models = found["models"]
    assert models["best trial"] == pytest.approx({name: alone[name].value for name in models["best trial"]}, rel=1e-3)
    assert found["base"] == models["base configuration"]["noc_85"] != models["plain model"]["noc_85"]
    assert found["best"] == models["best trial"]["noc_85"] != found["base"]
    assert found["difference"] == pytest.approx(found["best"] - found["base"])
    assert found["low"] <= found["difference"] <= found["high"]

    single = measure_click_held_out(held_out, None, best, config, metric="valid_loss")
    assert (single["metric"], single["compared_with"]) == ("mean_iou_3", "plain model")
    assert (single["base"], single["best"]) == tuple(models[one]["mean_iou_3"] for one in ("plain model", "best trial"))


def test_the_report_says_that_fewer_clicks_are_better():
    space = space_of(RANKS, search={"metric": "noc_85"})
    records = [trial(0, 4.5, lora__rank=2), trial(1, 3.25, lora__rank=4)]
    text = text_of(space, records)
    assert "Trial 1 is the best: clicks to IoU 0.85 3.250 instead of 4.500" in text
    assert "validate" in text
    assert "--clicks" in text
    assert "--prompt" not in text


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["mean_iou_3", "noc_85"])
def test_a_sweep_finds_the_best_trial(metric, data_dir, tmp_path):
    space = load_space(
        {
            "base": "clicks_quick_test",
            "set": {"training.max_steps": None, "training.num_epochs": 1, "scaling.num_workers": 0},
            # The first trial learns nothing, the last one too much at once.
            "parameters": {"training.learning_rate": {"grid": [1e-9, 3e-3, 1.0]}},
            "search": {"algorithm": "grid", "metric": metric, "include_base": False, "max_concurrent": 2},
        },
        overrides=[f"training.data_dir={data_dir}"],
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    try:
        result = run_sweep(space, tmp_path / "sweep")
    finally:
        ray.shutdown()
    values = {record.number: record.value for record in result.records}
    assert len(values) == 3
    assert result.best.value == (min if metric == "noc_85" else max)(values.values())
    assert {record.metrics[metric] for record in result.records} == set(values.values())
