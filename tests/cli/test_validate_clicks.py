"""`sam3lora validate --clicks`, as people type it, with a random click head over the tiny model."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam3lora.cli import main
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.engine.clicks.interaction import Interaction
from sam3lora.errors import UserError
from sam3lora.evaluation.ask import click_run
from sam3lora.evaluation.ask.click_run import evaluate_clicks
from sam3lora.evaluation.clicks.measure import ClickMetrics
from sam3lora.evaluation.clicks.settings import ClickEvaluation
from sam3lora.evaluation.report.click_pictures import ClickGallery
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import load_base

from ..evaluation.adapters import write_adapter
from ..model.clicks.click_adapters import write_click_adapter
from ..model.clicks.video_checkpoint import write_video_checkpoint
from .test_validate import external_references

CLICKS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "base"
    write_video_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two drawn images of things that the tiny model knows."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    return write_dataset(folder, num_train=1, num_valid=2, size=96, domain="base", seed=3, progress=False)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """It changes the vision tower: clicks see another trunk."""
    return write_adapter(tmp_path_factory.mktemp("run") / "best", base, components=("vision_encoder",))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The intervals have tests of their own."""
    monkeypatch.setattr(click_run, "measure_clicks", functools.partial(click_run.measure_clicks, num_resamples=5))


def clicked(base: Path, data: Path, adapter: Path | None = None, **settings) -> ClickMetrics:
    return evaluate_clicks(
        data / "valid", adapter, ClickEvaluation(max_clicks=CLICKS, **settings), model=str(base), device="cpu"
    )


def test_the_base(base, data, tmp_path, capsys):
    words = ["validate", "--clicks", "--model", base, "--val-data-dir", data, "--output", tmp_path]
    areas = ["--max-hole-area", "4", "--max-sprinkle-area", "16"]
    assert main([*map(str, words), "--max-clicks", str(CLICKS), *areas]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["task"], metrics["label"], metrics["num_images"]) == ("clicks", "base", 2)
    annotations = json.loads((data / "valid" / "_annotations.coco.json").read_text())["annotations"]
    assert metrics["num_objects"] == len(annotations)
    assert 0 <= metrics["noc_85"] <= CLICKS
    assert 0 < metrics["from_text"]["num_found"] <= len(annotations)  # the detector of the tiny model is a trained one
    assert metrics["from_text"]["start_from"] == metrics["settings"]["start_from"] == "both"
    assert metrics["settings"]["max_clicks"] == CLICKS
    assert (metrics["settings"]["max_hole_area"], metrics["settings"]["max_sprinkle_area"]) == (4, 16)
    assert sum(entry["num_objects"] for entry in metrics["per_category"].values()) == len(annotations)
    assert f"{metrics['noc_85']:.3f}" in out
    assert not external_references(tmp_path / "report.html")


def test_images_of_another_size_than_listed(base, data, tmp_path):
    """Files of half the size are smaller copies of the annotated images: objects stay where they are."""
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "valid").rglob("*.[jp][pn]g"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    whole, half = clicked(base, data), clicked(base, tmp_path / "data")
    assert half.clicks.alone.objects == whole.clicks.alone.objects
    assert half.clicks.alone.ious() == pytest.approx(whole.clicks.alone.ious(), abs=0.2)
    gallery = ClickGallery(half, 1)
    panels = gallery.picture(half.clicks.alone.objects[0]).panels
    assert panels


def test_an_adapter_of_the_trunk_acts_on_clicks(base, data, adapter):
    """And `clicks_vision: base` takes it away from the click head, not from the detector."""
    of_base = clicked(base, data)
    ious = of_base.clicks.alone.ious()
    adapted = clicked(base, data, adapter, prompting=EvaluationSettings(batch_size=1))
    assert adapted.clicks.alone.objects == of_base.clicks.alone.objects
    assert not np.allclose(adapted.clicks.alone.ious(), ious, atol=1e-3)
    with_base = clicked(base, data, adapter, clicks_vision="base")
    assert with_base.clicks.alone.ious() == pytest.approx(ious, abs=1e-6)
    assert with_base.num_found == adapted.num_found
    assert with_base.settings["clicks_vision"] == "base"


def test_an_adapter_of_the_click_head(base, data, tmp_path, capsys):
    folder = write_click_adapter(tmp_path / "mine", base)
    given = ["--val-data-dir", str(data), "--output", str(tmp_path / "out"), "--max-clicks", "1", "--num-samples", "1"]
    assert main(["validate", "--clicks", "--weights", str(folder), *given]) == 0
    capsys.readouterr()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["label"] == "mine"
    assert metrics["settings"]["base_model"] == str(base)
    tracker = fingerprint(load_click_head(load_base(str(base))))  # without the adapter
    assert (metrics["settings"]["click_adapter"], metrics["settings"]["tracker_fingerprint"]) == (
        str(folder),
        tracker[:12],
    )
    of_base = clicked(base, data, prompting=EvaluationSettings(num_samples=1))
    assert (of_base.settings["click_adapter"], of_base.settings["tracker_fingerprint"]) == (None, tracker[:12])
    assert metrics["mean_iou_1"] != pytest.approx(of_base.alone["mean_iou_1"].value, abs=1e-4)
    assert metrics["from_text"]["num_found"] == of_base.num_found
    # trained on the trunk of an adapter, used on that of the base
    other = write_click_adapter(tmp_path / "other", base, vision_adapter="0" * 64)
    assert main(["validate", "--clicks", "--weights", str(other), *given]) == 2
    assert "trunk" in capsys.readouterr().err


def test_runs_from_text_start_from_what_was_found(base, data, monkeypatch):
    seeds = []
    add = Interaction.add

    def noted(self, clicks=(), **options):
        if self.before is None:
            seeds.append(self.seed)
        return add(self, clicks, **options)

    monkeypatch.setattr(Interaction, "add", noted)
    metrics = clicked(base, data, start_from="box")
    alone, from_text = metrics.clicks.alone, metrics.clicks.from_text
    found = np.array([metrics.clicks.facts[one].is_found for one in alone.objects])
    assert found.any()
    before = from_text.ious()[:, 0]
    assert (before[found] >= 0.5).all()
    assert (before[~found] == 0).all()
    assert (alone.ious()[:, 0] == 0).all()
    assert np.array_equal(alone.ious()[~found], from_text.ious()[~found])
    assert {seed.kind for seed in seeds if seed is not None} == {"box"}
    assert sum(seed is not None for seed in seeds) <= found.sum()  # none where the detection is right to the pixel
    # without a prompt the same clicks, and none of the others
    seeds.clear()
    plain = clicked(base, data, start_from=None)
    assert plain.clicks.alone.ious() == pytest.approx(alone.ious(), abs=1e-6)
    assert plain.from_text is None
    assert set(seeds) == {None}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--clicks", "--semantic"], "--semantic"),
        (["--clicks", "--saco", "x.json"], "--saco"),
        (["--clicks", "--save-threshold", "overall"], "--save-threshold"),
        (["--clicks", "--lowest-score", "auto"], "--lowest-score"),
        (["--clicks", "--paper-normalisation"], "--paper-normalisation"),
        (["--clicks", "--predictions", "x.json"], "--clicks"),
        (["--clicks", "--start-from", "none", "--nms-iou", "0.5"], "--nms-iou"),
        (["--clicks", "--clicks-vision", "base"], "--weights"),
        (["--start-from", "box"], "--start-from"),
        (["--clicks-vision", "base"], "--clicks-vision"),
        (["--max-clicks", "3"], "--max-clicks"),
        (["--max-hole-area", "8"], "--max-hole-area"),
        (["--max-sprinkle-area", "0"], "--max-sprinkle-area"),
        (["--clicks", "--max-hole-area", "-1"], "max_hole_area"),
        (["--clicks", "--max-sprinkle-area", "10001"], "max_sprinkle_area"),
        (["--clicks", "--max-sprinkle-area", "nan"], "--max-sprinkle-area"),
    ],
)
def test_options_without_effect_are_refused(data, tmp_path, capsys, words, named):
    given = ["validate", *words, "--use-base-model", "--val-data-dir", str(data), "--output", str(tmp_path / "out")]
    assert main(given) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_model_at_a_time(data, adapter, tmp_path, capsys):
    given = ["validate", "--clicks", "--val-data-dir", str(data), "--output", str(tmp_path / "out")]
    for more in (["--weights", str(adapter), str(adapter)], ["--weights", str(adapter), "--use-base-model"]):
        assert main([*given, *more]) == 2
        assert "one model at a time" in capsys.readouterr().err


def test_a_base_without_a_tracker(data, small_base, tmp_path, capsys):
    given = ["--val-data-dir", str(data), "--output", str(tmp_path / "out")]
    assert main(["validate", "--clicks", "--model", str(small_base), *given]) == 2
    assert "no tracker" in capsys.readouterr().err


def test_values_out_of_range():
    for wrong in ({"start_from": "point"}, {"clicks_vision": "both"}, {"max_clicks": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ClickEvaluation(**wrong)


def test_nothing_of_the_split_is_asked(base, data):
    with pytest.raises(UserError, match="nothing to click on"):
        clicked(base, data, prompting=EvaluationSettings(categories=()))
