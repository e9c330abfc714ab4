"""Images that cannot be read with `training.on_bad_image=skip`: metrics leave them out, and a run needs some others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sam3lora.data.bad_images import SkippedImage
from sam3lora.errors import UserError
from sam3lora.training import gone_images
from sam3lora.training.launch import train

from .changed_scenes import rewritten, with_broken_images
from .run_folder import lines_of

METRICS = ("valid_loss", "map", "bbox_map", "presence_accuracy")


def without_image(file_name: str) -> Callable[[dict], None]:
    """A change that takes an image and its annotations out."""

    def change(content: dict) -> None:
        (image_id,) = [one["id"] for one in content["images"] if one["file_name"] == file_name]
        content["images"] = [one for one in content["images"] if one["id"] != image_id]
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != image_id]

    return change


def test_metrics_are_those_of_the_images_that_can_be_read(make_config, scenes, tmp_path):
    broken = with_broken_images(scenes, tmp_path / "broken", "valid/00001.jpg")
    fewer = rewritten(scenes, tmp_path / "fewer", without_image("00001.jpg"))
    found = []
    for data in (broken, fewer):
        options = {"data_dir": str(data), "num_epochs": 1, "max_steps": 1, "on_bad_image": "skip"}
        asked = ("evaluation.every_epochs=1", "data.categories=[gear, arrow, bolt, capsule]")
        config = make_config("evaluation.base_loss=false", *asked, output=data.name, **options)
        train(config)
        (line,) = lines_of(config, "epoch")
        found.append([line[name] for name in METRICS])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_run_whose_validation_images_are_gone_stops(make_config, scenes, tmp_path):
    # A loss of no image would be 0, better than all that follow.
    names = [f"valid/{path.name}" for path in (scenes / "valid").glob("*.jpg")]
    data = with_broken_images(scenes, tmp_path / "broken", *names)
    config = make_config("evaluation.base_loss=false", data_dir=str(data), num_epochs=1, on_bad_image="skip")
    with pytest.raises(UserError, match=r"none of the validation images could be read.*valid.*--resume"):
        train(config)
    assert not (Path(config.output.output_dir) / "best").exists()


def test_a_run_whose_training_images_are_gone_stops(make_config, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(gone_images, "MOST_STEPS_WITHOUT_IMAGES", 2)
    names = [f"train/{path.name}" for path in (scenes / "train").glob("*.jpg")]
    data = with_broken_images(scenes, tmp_path / "broken", *names)
    config = make_config("evaluation.base_loss=false", data_dir=str(data), num_epochs=1, on_bad_image="skip")
    with pytest.raises(UserError, match=r"none of the images of 2 steps in a row could be read.*train.*--resume"):
        train(config)


def test_steps_with_an_image_begin_the_count_again(monkeypatch):
    monkeypatch.setattr(gone_images, "MOST_STEPS_WITHOUT_IMAGES", 2)
    skipped = [SkippedImage(1, "a.jpg", "cannot read image a.jpg")]
    steps = gone_images.StepsWithoutImages()
    for num_images in (0, 1, 0, 3):
        steps.count(num_images, skipped)
    steps.count(0, [])  # nothing to learn from, but nothing is lost
    steps.count(0, skipped)
    with pytest.raises(UserError, match="2 steps in a row"):
        steps.count(0, skipped)
