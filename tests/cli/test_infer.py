"""`sam3lora infer` as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam3lora.cli import main

from ..model.conftest import write_adapter


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels)
    return tmp_path / "photo.png"


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    """Default outputs go to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(small_base, photo, capsys):
    """Ask the photo of everything a small random model finds; returns status, output and errors."""

    def call(*words: object, threshold: str = "0", image: Path = photo) -> tuple[int, str, str]:
        options = ["--model", small_base, "--threshold", threshold, "--image", image, *words]
        status = main(["infer", *map(str, options)])
        return status, *capsys.readouterr()

    return call


def test_nothing_found(run, tmp_path):
    status, out, _ = run("--prompt", "crack", threshold="1")
    assert status == 0
    assert "0 of 1" in out
    assert (tmp_path / "output.png").is_file()


def test_picture_and_json_of_an_image(run, tmp_path):
    status, out, _ = run("--prompt", "crack", "a hole", "--nms-iou", "1", "--output", "o/p.jpg", "--json", "o/d.json")
    assert status == 0
    assert all(prompt in out for prompt in ("crack", "a hole"))
    assert (tmp_path / "o/p.jpg").is_file()
    written = json.loads((tmp_path / "o/d.json").read_text())
    (image,) = written["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("photo.png", 90, 60)
    assert [result["prompt"] for result in image["results"]] == ["crack", "a hole"]
    assert image["results"][0]["num_detections"] == 8
    assert image["results"][0]["detections"][0]["mask"]["size"] == [60, 90]
    assert written["settings"]["threshold"] == 0


def test_options_reach_the_result(run, tmp_path):
    words = ("--prompt", "crack", "--nms-iou", "1", "--json", "d.json")
    run(*words, "--max-detections", "3", "--no-masks")
    (result,) = json.loads((tmp_path / "d.json").read_text())["images"][0]["results"]
    assert result["num_detections"] == 3
    assert "mask" not in result["detections"][0]
    run(*words, "--merge", "--merge-iou", "0")
    written = json.loads((tmp_path / "d.json").read_text())
    assert written["images"][0]["results"][0]["num_detections"] == 1
    assert (written["settings"]["merge"], written["settings"]["merge_iou"]) == (True, 0)


def test_boxes_are_drawn_if_wanted(run, tmp_path):
    def picture(*words: str) -> np.ndarray:
        assert run("--prompt", "crack", *words)[0] == 0
        return cv2.imread(str(tmp_path / "output.png"))

    plain = picture()
    assert np.array_equal(picture("--boundingbox", "False"), plain)
    with_boxes = picture("--boundingbox", "True")
    assert not np.array_equal(with_boxes, plain)
    assert np.array_equal(picture("--boundingbox"), with_boxes)
    # without masks boxes are what is left to see
    assert np.array_equal(picture("--no-masks"), picture("--no-masks", "--boundingbox"))
    assert not np.array_equal(picture("--no-masks"), picture("--no-masks", "--boundingbox", "False"))


def test_example_boxes(run, tmp_path):
    def scores(*words: object) -> list[float]:
        assert run("--nms-iou", "1", "--json", "d.json", *words)[0] == 0
        (result,) = json.loads((tmp_path / "d.json").read_text())["images"][0]["results"]
        return [result["prompt"], *(detection["score"] for detection in result["detections"])]

    box = ("--box", 10, 5, 40, 30)
    assert scores(*box)[0] == "visual"
    answers = [scores("--prompt", "crack", *boxes) for boxes in ((), box, (*box, "--box", 50, 5, 80, 30))]
    answers.append(scores("--prompt", "crack", *box, "--negative-box", 50, 5, 80, 30))
    assert len({tuple(answer) for answer in answers}) == 4


def test_folder_goes_on_after_bad_images(run, photo, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(photo.read_bytes())
    (images / "bad.jpg").write_text("no image")
    status, out, error = run("--prompt", "crack", "--output", "out", image=images)
    assert status == 0
    assert "1 of 2 images" in out
    assert "1 could not be read" in out
    assert "bad.jpg: no known image format" in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "results.json"]
    (images / "a.png").unlink()
    status, _, error = run("--prompt", "crack", image=images)
    assert status == 2
    assert "none of the 1 images" in error


def test_interrupt_keeps_what_is_done(run, photo, tmp_path, monkeypatch):
    from sam3lora import Predictor

    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(photo.read_bytes())
    predict = Predictor.predict

    def stop_at_b(self, path, *args, **options):
        if path.name == "b.png":
            raise KeyboardInterrupt
        return predict(self, path, *args, **options)

    monkeypatch.setattr(Predictor, "predict", stop_at_b)
    status, out, _ = run("--prompt", "crack", "--json", "d.json", image=images)
    assert status == 130
    assert "1 of 2 images" in out
    written = json.loads((tmp_path / "d.json").read_text())
    assert ([image["file_name"] for image in written["images"]], written["interrupted"]) == (["a.png"], True)


def test_configuration_of_a_run(small_base, photo, tmp_path, capsys):
    # what the file sets is used, options win, and what it does not set stays as without it
    (tmp_path / "run.yaml").write_text(
        f"lora: {{apply_to_detr_decoder: true}}\nmodel: {{name: {small_base}}}\n"
        "evaluation: {prob_threshold: 0.0, max_detections: 2}\n"
        "output: {output_dir: nowhere}\n"
    )
    words = ["infer", "--config", "run.yaml", "--image", str(photo), "--prompt", "crack", "--json", "d.json"]
    assert main([*words, "--max-detections", "3"]) == 0
    settings = json.loads((tmp_path / "d.json").read_text())["settings"]
    assert settings["model"] == str(small_base)
    assert (settings["threshold"], settings["max_detections"], settings["nms_iou"]) == (0.0, 3, 0.7)
    assert settings["adapter"] is None


def test_adapter_of_a_configured_run(small_base, photo, tmp_path):
    # without --weights it is the best adapter of the run that the configuration names
    write_adapter(small_base, tmp_path / "run" / "best")
    (tmp_path / "run.yaml").write_text("lora: {apply_to_detr_decoder: true}\noutput: {output_dir: run}\n")
    words = ["infer", "--image", str(photo), "--prompt", "crack", "--json", "d.json"]
    for more in (["--config", "run.yaml"], ["--weights", "run/best"]):
        assert main([*words, *more]) == 0
        settings = json.loads((tmp_path / "d.json").read_text())["settings"]
        assert (settings["adapter"], settings["model"]) == ("run/best", str(small_base))
