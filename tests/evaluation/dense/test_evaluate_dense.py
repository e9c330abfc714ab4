"""A dense folder measured on a small split: the numbers are those of the maps that it leaves."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sam3lora.data.images import ImageError
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.dense_run import evaluate_dense
from sam3lora.evaluation.dense.confusion import ConfusionMatrix
from sam3lora.evaluation.dense.map_files import png_names
from sam3lora.evaluation.dense.settings import DenseEvaluation
from sam3lora.evaluation.report.dense_page import render_dense_report

from ...model.dense.dense_cases import CLASSES, write_dense
from ..splits import HEIGHT, WIDTH, write_split


@pytest.fixture(scope="module")
def folders(spread_base, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    return {mode: write_dense(spread_base, root / mode, mode) for mode in CLASSES}


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    """Three images of noise with squares of some classes; the third has none."""
    names = {1: "crack", 2: "gear", 3: "red bolt", 4: "dirt"}
    objects = [(0, 1, 10), (0, 2, 10), (0, 3, 40), (1, 4, 20), (1, 1, 50), (1, 2, 35)]
    folder = write_split(tmp_path_factory.mktemp("split") / "valid", objects, names, num_images=3)
    rng = np.random.default_rng(0)
    for number in range(3):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(small, (WIDTH, HEIGHT)))
    return folder


def square(*xs: int, value: int = 1) -> np.ndarray:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for x in xs:
        labels[10:30, x : x + 20] = value
    return labels


def test_one_map_of_all_classes(folders, split, tmp_path):
    metrics = evaluate_dense(split, folders["multiclass"], keep_in=tmp_path)
    matrix = ConfusionMatrix(CLASSES["multiclass"])
    truths = [square(10) + square(40, value=2), square(35), square()]
    for number, truth in enumerate(truths):
        with Image.open(tmp_path / "predictions" / f"{number}.png") as file:
            assert file.mode == "P"
            matrix.add(np.array(file), truth, image_id=number)
    assert metrics.values["mean_iou"] == matrix.values().mean_iou
    assert metrics.meter.matrices[0].matrix_NN.tolist() == matrix.matrix_NN.tolist()
    assert 0 < metrics.values["mean_iou"] < 1
    assert any("crack, dirt" in note for note in metrics.notes)
    assert not (tmp_path / "probabilities").exists()
    assert metrics.settings["resolution"] == 112
    page = render_dense_report(metrics, num_pictures=1)
    assert page.count("<figure>") == 3
    assert page.count("data:image/jpeg") == 3 * 4


def test_a_threshold_of_a_binary_model(folders, split, tmp_path):
    found = {}
    for threshold in (0.3, None):
        out = tmp_path / str(threshold)
        metrics = evaluate_dense(split, folders["binary"], DenseEvaluation(threshold=threshold), keep_in=out)
        grey = cv2.imread(str(out / "probabilities" / "0.png"), cv2.IMREAD_UNCHANGED)
        labels = np.array(Image.open(out / "predictions" / "0.png"))
        assert labels.any()
        assert not labels.all()
        # the probability is rounded down, so it is below the threshold by one level at most
        assert grey[labels == 1].min() >= np.floor(255 * (threshold or 0.5))
        assert grey[labels == 0].max() <= 255 * (threshold or 0.5)
        found[threshold] = metrics
    assert found[0.3].settings["threshold"] == 0.3
    assert found[0.3].per_class["crack"].recall > found[None].per_class["crack"].recall
    assert found[0.3].values["mae"] == found[None].values["mae"]


def test_a_map_for_each_class(folders, split, tmp_path):
    metrics = evaluate_dense(split, folders["multilabel"], keep_in=tmp_path)
    assert list(metrics.per_class) == ["gear", "dirt"]
    matrix = ConfusionMatrix(("background", "gear"))
    for number, truth in enumerate((square(10), square(35), square())):
        labels = np.array(Image.open(tmp_path / "predictions" / "gear" / f"{number}.png"))
        assert set(np.unique(labels)) <= {0, 255}
        matrix.add(labels // 255, truth, image_id=number)
    assert metrics.per_class["gear"].iou == matrix.values().per_class["gear"].iou
    assert render_dense_report(metrics, num_pictures=1).count("<figure>") >= 2


def test_how_images_are_batched_changes_nothing(folders, split):
    whole = evaluate_dense(split, folders["binary"], DenseEvaluation(batch_size=3))
    single = evaluate_dense(split, folders["binary"], DenseEvaluation(batch_size=1))
    assert single.values == pytest.approx(whole.values, abs=1e-5)
    assert whole.predictions is None
    first = evaluate_dense(split, folders["binary"], DenseEvaluation(num_samples=1))
    assert first.num_images == 1
    stretched = evaluate_dense(split, folders["binary"], DenseEvaluation(paper_normalisation=True))
    assert stretched.values["mae"] != whole.values["mae"]
    assert stretched.values["mean_iou"] == whole.values["mean_iou"]
    assert stretched.settings["paper_normalisation"] is True


def test_an_image_that_cannot_be_read_stops(folders, split, tmp_path):
    copy = write_split(tmp_path / "valid", [(0, 1, 10)], {1: "crack"})
    (copy / "1.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"1\.png"):
        evaluate_dense(copy, folders["binary"])


def test_data_of_other_classes_are_refused(folders, tmp_path):
    other = write_split(tmp_path / "valid", [(0, 1, 10)], {1: "car"})
    with pytest.raises(UserError, match="car"):
        evaluate_dense(other, folders["binary"])


def test_names_of_maps_stay_inside_and_differ():
    names = png_names(["/a/b.jpg", "../../c.jpg", "x\\y.jpg", "d.jpg", "d.png", "D.jpg", "e"])
    assert names == ["a/b.png", "c.png", "x/y.png", "d.jpg.png", "d.png.png", "D.png", "e.png"]
    assert len(set(png_names(["a.jpg", "a.jpg", "a.jpg.jpg"]))) == 3
