"""The study of dense prediction: labels of a prompted model by hand, rows that are kept, and a run of one step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jobs.bench import dense_study, dense_study_prompted
from jobs.bench.dense_study import table
from jobs.bench.dense_study_limit import best_iou
from jobs.bench.dense_study_prompted import head_logits, measure_semantic
from jobs.bench.dense_study_ways import STEPS, DenseRun, configuration, measure
from sam3lora.config.dense import DenseSection
from sam3lora.data.synth.dataset import write_dataset

from ..evaluation.splits import HEIGHT, WIDTH, write_split

RUN = DenseRun("scenes", "lora", 1, 500, 60.0, 120.0, 0.7, 0.6, 0.9)


def test_a_pixel_has_the_largest_logit_or_is_background():
    of_two = [np.array([[2.0, -1.0, -1.0]]), np.array([[1.0, 3.0, -2.0]])]
    assert head_logits(of_two, "multiclass").argmax(axis=0).tolist() == [[1, 2, 0]]
    assert head_logits(of_two, "binary").tolist() == [[[2.0, 3.0, -1.0]]]
    assert head_logits(of_two, "multilabel").shape == (2, 1, 3)


class PoolOfHandDrawnLogits:
    """Finds a wall of 40 columns in every image, and a window in columns 10 to 20, whatever the image shows."""

    def __init__(self, **_):
        pass

    def semantic_each(self, images, prompts, labels):
        wall, window = np.full((2, HEIGHT, WIDTH), -4.0, np.float32)
        wall[:, :40], window[:, 10:20] = 1.0, 2.0
        drawn = {"wall": wall, "window": window}
        return {labels[0]: [[drawn[prompt] for prompt in of_image] for of_image in prompts]}


def test_overlap_is_measured_in_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_study_prompted, "AdapterPool", PoolOfHandDrawnLogits)
    strips = {name: [[0, 0, right, 0, right, HEIGHT, 0, HEIGHT]] for name, right in (("wall", 40), ("window", 20))}
    objects = [(0, 1, 0, {"segmentation": strips["wall"]}), (0, 2, 0, {"segmentation": strips["window"]})]
    write_split(tmp_path / "valid", objects, {1: "wall", 2: "window"}, num_images=1)
    # Columns of the image: wall 0 to 40, a window on it 0 to 20; the wall found whole, half of the window.
    one_label = measure_semantic(tmp_path, None, DenseSection(mode="multiclass"))
    assert one_label["mean_iou_foreground"] == pytest.approx((20 / 30 + 10 / 20) / 2)
    assert one_label["mean_iou"] == pytest.approx((1 + 20 / 30 + 10 / 20) / 3)
    assert one_label["pixel_accuracy"] == pytest.approx(70 / 80)
    overlapping = measure_semantic(tmp_path, None, DenseSection(mode="multilabel"))
    assert overlapping["mean_iou_foreground"] == pytest.approx((1 + 10 / 20) / 2)
    for found in (one_label, overlapping):
        assert found["semantic_mean_iou"] == pytest.approx((1 + 10 / 20) / 2)


@pytest.mark.parametrize("way", STEPS)
def test_every_way_has_a_configuration(way, tmp_path):
    changes = ["dense.mode=multilabel", "training.weight_decay=0.1"]
    config = configuration(tmp_path, way, 3, 1, tmp_path, changes)
    assert (config.training.max_steps, config.training.images_per_step) == (3, 8)
    assert config.training.weight_decay == 0.1
    assert config.dense.mode == ("auto" if way == "prompted" else "multilabel")


def test_rows_are_kept_and_the_base_is_measured_once(tmp_path, monkeypatch):
    asked = []

    def measured(data_dir, way, steps, seed, changes):
        asked.append((way, steps, seed))
        return replace(RUN, data=data_dir.name, way=way, steps=steps, seed=seed, mean_iou=seed / 10)

    monkeypatch.setattr(dense_study, "measure", measured)
    options = [str(tmp_path / "scenes"), "--results", str(tmp_path / "rows.jsonl"), "--threads", "1", "--steps"]
    dense_study.main([*options, "prompted=0", "lora=5", "--seeds", "2"])
    assert asked == [("prompted", 0, 1), ("lora", 5, 1), ("lora", 5, 2)]
    dense_study.main([*options, "lora=5", "--seeds", "3"])
    assert asked[3:] == [("lora", 5, 3)]
    dense_study.main([*options, "lora=6", "--seeds", "1"])
    assert asked[4:] == [("lora", 6, 1)]


@pytest.mark.parametrize("text", ["lora=0", "lora", "all=5"])
def test_a_wrong_number_of_steps_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        dense_study.main(["scenes", "--steps", text])
    assert text in capsys.readouterr().err


def test_means_over_seeds_by_number_of_steps():
    runs = [RUN, replace(RUN, seed=2, mean_iou=0.8, cpu_s=180.0), replace(RUN, steps=9)]
    *_, both, alone = table(runs).splitlines()
    assert both == "| scenes | lora | 500 | 2 | 2.5 | 0.750 (0.700 to 0.800) | 0.600 (0.600 to 0.600) | 0.900 |"
    assert alone == "| scenes | lora | 9 | 1 | 2.0 | 0.700 | 0.600 | 0.900 |"


def test_the_best_that_a_map_of_so_many_pixels_can_be(tmp_path):
    thin = {"segmentation": [[34, 0, 36, 0, 36, HEIGHT, 34, HEIGHT]]}  # 2 columns of 80
    whole = {"segmentation": [[20, 0, 60, 0, 60, HEIGHT, 20, HEIGHT]]}
    write_split(tmp_path / "valid", [(0, 1, 0, thin)], {1: "crack"}, num_images=1)
    assert best_iou(tmp_path, 80) == pytest.approx(1)
    assert best_iou(tmp_path, 20) == pytest.approx(2 / 4)  # half of one pixel, which says nothing of the side
    assert best_iou(tmp_path, 4) == 0  # a tenth of one
    write_split(tmp_path / "wall" / "valid", [(0, 1, 0, whole)], {1: "wall"}, num_images=1)
    assert best_iou(tmp_path / "wall", 4) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("way", STEPS)
def test_one_step_of_every_way(way, tmp_path):
    data = write_dataset(tmp_path / "scenes", num_train=8, num_valid=2, seed=0, progress=False)
    run = measure(data, way, 1, 1)
    assert run.cpu_s > 0
    assert 0 <= run.mean_iou_foreground <= 1
    assert (run.semantic_mean_iou is None) == (way != "prompted")
