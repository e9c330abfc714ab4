"""`sam3lora infer` with a dense folder: files, areas, and options that mean nothing to it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sam3lora.cli import main

from ..model.dense.dense_cases import write_dense


@pytest.fixture(scope="module")
def folders(spread_base, tmp_path_factory) -> dict[str, Path]:
    """Mode -> a folder of it; read only."""
    root = tmp_path_factory.mktemp("dense")
    return {mode: write_dense(spread_base, root / mode, mode) for mode in ("multiclass", "binary", "multilabel")}


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photo.png"


def infer(*words: object) -> int:
    return main(["infer", *map(str, words)])


def labels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_labels_of_an_image(folders, photo, tmp_path, capsys):
    assert infer("--weights", folders["multiclass"], "--image", photo) == 0
    written = json.loads((tmp_path / "output/results.json").read_text())
    (image,) = written["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("photo.png", 90, 60)
    labels_HW = labels_of(tmp_path / "output" / image["label_png"])
    assert labels_HW.shape == (60, 90)
    for value, entry in enumerate(image["classes"]):
        area = int((labels_HW == value).sum())
        assert (entry["area_px"], entry["share"]) == (area, pytest.approx(area / 5400, abs=1e-6))
    assert cv2.imread(str(tmp_path / "output" / image["overlay"])).shape[1] == 4 * 90
    assert written["settings"]["task"] == "dense"
    out = capsys.readouterr().out
    assert all(name in out for name in ("background", "gear", "red bolt", "1 of 1 images"))


def test_a_folder_of_images_with_a_threshold_and_probabilities(folders, photo, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "a.bmp"):
        (images / name).write_bytes(photo.read_bytes())
    (images / "bad.jpg").write_text("no image")
    words = ("--weights", folders["binary"], "--image", images, "--output", "out", "--json", "d.json")
    assert infer(*words, "--threshold", 0.8, "--probabilities") == 0
    captured = capsys.readouterr()
    assert "bad.jpg: no known image format" in captured.err
    assert "2 of 3 images" in captured.out
    written = json.loads((tmp_path / "d.json").read_text())
    assert written["settings"]["threshold"] == 0.8
    assert [image["label_png"] for image in written["images"]] == ["labels/a.bmp.png", "labels/a.png.png"]
    for image in written["images"]:
        labels_HW = labels_of(tmp_path / "out" / image["label_png"])
        probability_HW = labels_of(tmp_path / "out" / image["classes"][0]["probability_png"])
        assert 0 < labels_HW.sum() < labels_HW.size
        assert probability_HW[labels_HW == 1].min() >= 0.8 * 255 - 1
        assert probability_HW[labels_HW == 0].max() <= 0.8 * 255 + 1


def test_classes_that_overlap(folders, photo, tmp_path):
    assert infer("--weights", folders["multilabel"], "--image", photo) == 0
    (image,) = json.loads((tmp_path / "output/results.json").read_text())["images"]
    assert "label_png" not in image
    for entry in image["classes"]:
        assert (labels_of(tmp_path / "output" / entry["mask_png"]) == 255).sum() == entry["area_px"]


def test_the_threshold_of_a_run(folders, photo, tmp_path):
    (tmp_path / "run.yaml").write_text("task: dense\nlora: {apply_to_vision_encoder: true}\ndense: {threshold: 0.7}\n")
    for more, expected in (([], 0.7), (["--threshold", 0.2], 0.2)):
        assert infer("--config", "run.yaml", "--weights", folders["binary"], "--image", photo, *more) == 0
        assert json.loads((tmp_path / "output/results.json").read_text())["settings"]["threshold"] == expected


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("multiclass", ["--prompt", "crack"]),
        ("multiclass", ["--box", 1, 2, 3, 4]),
        ("multiclass", ["--negative-box", 1, 2, 3, 4]),
        ("multiclass", ["--nms", "box"]),
        ("multiclass", ["--nms-iou", 0.5]),
        ("multiclass", ["--merge"]),
        ("multiclass", ["--merge-iou", 0.5]),
        ("multiclass", ["--max-detections", 3]),
        ("multiclass", ["--boundingbox"]),
        ("multiclass", ["--no-masks"]),
        ("multiclass", ["--threshold", 0.5]),
        ("binary", ["--threshold", 2]),
        ("binary", ["--output", "picture.png"]),
    ],
)
def test_options_without_effect(folders, photo, tmp_path, mode, words, capsys):
    assert infer("--weights", folders[mode], "--image", photo, *words) == 2
    error = capsys.readouterr().err
    assert words[0].removeprefix("--") in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "output").exists()


def test_probabilities_of_prompts(spread_base, photo, capsys):
    assert infer("--model", spread_base, "--image", photo, "--prompt", "crack", "--probabilities") == 2
    assert "--probabilities" in capsys.readouterr().err
