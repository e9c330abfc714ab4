"""Asking the phrases of an SA-Co file."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from sam3lora.data.bad_images import SkippedImage
from sam3lora.engine.engine import Engine
from sam3lora.errors import UserError
from sam3lora.evaluation.ask.saco_phrases import ask_saco
from sam3lora.evaluation.ask.worker import Models
from sam3lora.evaluation.metrics.saco import evaluate_saco
from sam3lora.evaluation.report.saving import save_saco, write_results
from sam3lora.evaluation.settings import EvaluationSettings

SIZES = {"a.png": (60, 80), "b.png": (40, 40)}
ENTRIES = [(7, "a.png", "gear"), (0, "b.png", "gear"), (3, "a.png", "red bolt")]


@pytest.fixture
def ground_truth(tmp_path):
    for name, (height, width) in SIZES.items():
        pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / name), pixels)
    images = [
        {
            "id": id_,
            "file_name": name,
            "text_input": phrase,
            "height": SIZES[name][0],
            "width": SIZES[name][1],
            "is_instance_exhaustive": 1,
        }
        for id_, name, phrase in ENTRIES
    ]
    file = tmp_path / "gold.json"
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "object"}]}))
    return file


def ask(file, small_base, **changes):
    models = Models(options={"model": str(small_base), "device": "cpu"})
    settings = EvaluationSettings({"threshold": 0.0, "nms": "none"}, **changes)
    return ask_saco(file, file.parent, models, settings).by_label["base"]


def test_phrases_of_an_image_share_a_vision_pass(ground_truth, small_base, monkeypatch, tmp_path):
    prepared = []
    prepare = Engine.prepare_image
    monkeypatch.setattr(Engine, "prepare_image", lambda self, *args: prepared.append(1) or prepare(self, *args))
    results = ask(ground_truth, small_base)
    assert len(prepared) == 2
    assert {entry["image_id"] for entry in results} == {0, 3, 7}
    for entry in results:
        name = next(name for id_, name, _ in ENTRIES if id_ == entry["image_id"])
        assert entry["segmentation"]["size"] == list(SIZES[name])
        # boxes are parts of the image's size
        x, y, width, height = entry["bbox"]
        assert 0 <= x <= x + width <= 1.00002
        assert 0 <= y <= y + height <= 1.00002
    # another phrase, other scores
    scores = [[e["score"] for e in results if e["image_id"] == id_] for id_ in (7, 3)]
    assert scores[0] != scores[1]
    # the evaluator reads them: nothing is annotated, so what fires at 0.5 is a false alarm
    (tmp_path / "predictions.json").write_text(json.dumps(results))
    counts = evaluate_saco([ground_truth], tmp_path / "predictions.json").counts()
    assert counts["units_evaluated"] == counts["IL_TN"] + counts["IL_FP"] == 3


def test_the_first_image_files_only(ground_truth, small_base):
    assert {entry["image_id"] for entry in ask(ground_truth, small_base, num_samples=1)} == {3, 7}


def test_missing_images_and_keys_are_named(ground_truth, small_base):
    (ground_truth.parent / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of its images are not in .*, e\.g\. b\.png"):
        ask(ground_truth, small_base)
    raw = json.loads(ground_truth.read_text())
    del raw["images"][1]["text_input"]
    ground_truth.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"images\[1\] lacks text_input"):
        ask(ground_truth, small_base)
    ground_truth.write_text(json.dumps(raw | {"images": []}))
    with pytest.raises(UserError, match="lists no image"):
        ask(ground_truth, small_base)


def test_names_of_skipped_files_that_are_no_text(ground_truth, tmp_path, capsys):
    skipped = [SkippedImage(3, "a\udcff.png", "the file is empty")]  # as Python reads the byte 0xff
    (tmp_path / "predictions.json").write_text("[]")
    save_saco({"mine": tmp_path / "predictions.json"}, [ground_truth], tmp_path, {0, 7}, skipped)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["skipped_images"] == [skipped[0]._asdict()]
    assert "image 3 a\\udcff.png: the file is empty" in capsys.readouterr().out


def test_phrases_of_an_image_that_cannot_be_read(ground_truth, small_base, tmp_path, capsys):
    (ground_truth.parent / "a.png").write_bytes(b"I am a text")
    models = Models(options={"model": str(small_base), "device": "cpu"})
    settings = EvaluationSettings({"threshold": 0.0, "nms": "none"})
    with pytest.raises(UserError, match=r"1 of 2 images cannot be read.*a\.png.*--on-bad-image skip"):
        ask_saco(ground_truth, ground_truth.parent, models, settings)
    # both entries of the image have no part in what is judged
    settings = settings.changed(on_bad_image="skip")
    found = ask_saco(ground_truth, ground_truth.parent, models, settings)
    assert found.image_ids == {0}
    assert {entry["image_id"] for entry in found.by_label["base"]} == {0}
    assert {(one.image_id, one.reason) for one in found.skipped} == {
        (7, "no known image format"),
        (3, "no known image format"),
    }
    files = write_results(found.by_label, tmp_path / "out")
    save_saco(files, [ground_truth], tmp_path / "out", found.image_ids, found.skipped)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["segm"]["counts"]["units_evaluated"] == 1
    assert [(one["image_id"], one["reason"]) for one in written["skipped_images"]] == [
        (7, "no known image format"),
        (3, "no known image format"),
    ]
    assert "2 of 3 phrases could not be read and are not measured: image 7 " in capsys.readouterr().out
    # as those of one that is not there
    (ground_truth.parent / "a.png").unlink()
    gone = ask_saco(ground_truth, ground_truth.parent, models, settings)
    assert (gone.image_ids, {one.reason for one in gone.skipped}) == ({0}, {"no such file"})
    (ground_truth.parent / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 images to measure could be read.*b\.png: the file is empty"):
        ask_saco(ground_truth, ground_truth.parent, models, settings)
