"""A folder of images: which are taken, what is written, and what a bad one or an interrupt does to the rest."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam3lora import Predictor
from sam3lora.errors import UserError
from sam3lora.inference.image_folder import list_images, predict_folder, result_names


@pytest.fixture(scope="module")
def predictor(small_base) -> Predictor:
    return Predictor(str(small_base), device="cpu", threshold=0.0, nms="none")


@pytest.fixture
def images(tmp_path) -> Path:
    """a.jpg, b.png (text), c.png and d.png (empty), with what else lies in a folder of images."""
    path = tmp_path / "images"
    (path / "more").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "c.png", ".hidden.png", "more/inner.png")):
        cv2.imwrite(str(path / name), np.full((20 + number, 30, 3), 60 * number, np.uint8))
    (path / "b.png").write_text("no image")
    (path / "d.png").write_bytes(b"")
    (path / "_annotations.coco.json").write_text("{}")
    return path


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        list_images(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="sub-folders are not searched: train"):
        list_images(tmp_path)
    with pytest.raises(UserError, match=r"cannot list the folder .*missing"):
        list_images(tmp_path / "missing")


def test_images_are_told_by_their_endings(images):
    (images / "UPPER.JPG").write_bytes(b"")
    assert [path.name for path in list_images(images)] == ["UPPER.JPG", "a.jpg", "b.png", "c.png", "d.png"]


def test_two_images_never_share_a_picture():
    paths = [Path(name) for name in ("a.jpg", "A.png", "b.tif", "c.d.png")]
    names = result_names(paths)
    assert names == ["a.jpg", "A.png", "b", "c.d"]
    assert result_names([]) == []


def run(predictor: Predictor, images: Path, output: Path, **options):
    paths = list_images(images)
    return predict_folder(
        predictor, paths, ["crack", "hole"], pictures_dir=output, json_path=output / "r.json", **options
    )


def test_bad_images_are_passed_over(predictor, images, tmp_path):
    ticks = []
    predictions = run(predictor, images, tmp_path / "out", on_done=lambda: ticks.append(1))
    assert len(ticks) == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "c.jpg", "r.json"]
    assert not predictions.interrupted
    written = json.loads((tmp_path / "out" / "r.json").read_text())
    sizes = [(image["file_name"], image["width"], image["height"]) for image in written["images"]]
    assert sizes == [("a.jpg", 30, 20), ("c.png", 30, 21)]
    assert [result["prompt"] for result in written["images"][0]["results"]] == ["crack", "hole"]
    assert written["images"] == predictions.images
    reasons = {item["file_name"]: item["reason"] for item in written["skipped"]}
    assert "no known image format" in reasons["b.png"]
    assert "empty" in reasons["d.png"]
    assert written["settings"]["prompts"] == ["crack", "hole"]
    assert written["settings"]["threshold"] == 0.0
    assert written["settings"]["model"] == predictor.settings["model"]


def test_wrong_prompt_is_no_bad_image(predictor, images, tmp_path):
    # it would fail for every image: say it once
    with pytest.raises(UserError, match="at most 32"):
        predict_folder(predictor, list_images(images), ["a" * 40], pictures_dir=tmp_path, json_path=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_json_that_cannot_be_written(predictor, images, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write"):
        predict_folder(
            predictor, list_images(images), ["crack"], pictures_dir=tmp_path, json_path=tmp_path / "file" / "r.json"
        )
