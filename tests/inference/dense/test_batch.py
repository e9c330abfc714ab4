"""Batch runs of dense folders, in this process instead of Ray's workers: files, COCO results, going on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sam3lora import Predictor
from sam3lora.data.coco import CocoIndex
from sam3lora.data.images import read_image
from sam3lora.data.masks import decode_mask
from sam3lora.engine.dense import DenseEngine
from sam3lora.errors import UserError
from sam3lora.inference.batch import job
from sam3lora.inference.batch.worker import ModelChoice, ShardWorker

from ...model.dense.dense_cases import write_dense


@pytest.fixture(scope="module")
def folder(spread_base, tmp_path_factory) -> Path:
    return write_dense(spread_base, tmp_path_factory.mktemp("dense") / "best")


@pytest.fixture
def images(tmp_path) -> Path:
    """a.png and sub/a.png, and a file that is none."""
    rng = np.random.default_rng(0)
    for name, width in (("a.png", 90), ("sub/a.png", 60)):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (50, width, 3), dtype=np.uint8))
    (tmp_path / "images" / "text.png").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def predict(images, folder, tmp_path, monkeypatch) -> Callable[..., job.BatchSummary]:
    """`predict_batch` of all images into `out`; `predict.asked` has what each start gave to workers."""

    def run(pending, settings, num_workers, use_gpu):
        call.asked.append([source.name for source in pending])
        (shard,) = job._shards(pending, settings.batch_size, 1)
        counts = ShardWorker(replace(settings, num_threads=1))(shard)
        assert not counts["mistake"], counts
        yield counts

    def call(*prompts: str, adapter: Path = folder, **options) -> job.BatchSummary:
        choice = ModelChoice(adapter=str(adapter))
        return job.predict_batch(images, tmp_path / "out", prompts, choice=choice, progress=False, **options)

    call.asked = []
    monkeypatch.setattr(job, "_run", run)
    monkeypatch.setattr(job, "ray_session", lambda *_, **__: contextlib.nullcontext())
    return call


def test_labels_and_coco_results_agree(predict, images, folder, tmp_path):
    summary = predict(overlays=True, probabilities=True)
    assert (summary.num_images, [bad["file_name"] for bad in summary.bad_images]) == (3, ["text.png"])
    out = tmp_path / "out"
    results = json.loads((out / "predictions.json").read_text())
    predictor = Predictor(adapter=folder, device="cpu")
    for image_id, name in ((1, "a.png"), (3, "sub/a.png")):
        expected = predictor.predict_dense(images / name)
        with Image.open(out / "labels" / f"{name}.png") as labels:
            assert np.array_equal(np.array(labels), expected.label_HW)
        of_image = {one["category_id"]: one for one in results if one["image_id"] == image_id}
        assert of_image.keys() <= {1, 2}  # gear and red bolt; the background is no category
        for value in (1, 2):
            mask_HW = expected.label_HW == value
            assert (value in of_image) == mask_HW.any()
            if value in of_image:
                assert np.array_equal(decode_mask(of_image[value]["segmentation"], mask_HW.shape), mask_HW)
                x, y, width, height = cv2.boundingRect(mask_HW.astype(np.uint8))
                assert of_image[value]["bbox"] == [x, y, width, height]
                assert 1 / 3 < of_image[value]["score"] < 1
        assert read_image(out / "overlays" / f"{name}.jpg").shape[0] > 50
        assert read_image(out / "probabilities" / "red bolt" / f"{name}.png").shape[:2] == expected.size_hw
    index = CocoIndex.from_folder(out / "dataset" / "train")
    assert set(index.names) <= {"gear", "red bolt"}
    assert len(index) == 2


def test_a_second_start_goes_on(predict, images, folder, spread_base, tmp_path):
    predict()
    cv2.imwrite(str(images / "new.png"), np.zeros((40, 40, 3), np.uint8))
    predict()
    assert predict.asked == [["a.png", "text.png", "sub/a.png"], ["new.png", "text.png"]]
    head = write_dense(spread_base, tmp_path / "other", width=64)  # other files: another run
    with pytest.raises(UserError, match="adapter was"):
        predict(adapter=head)
    predict(adapter=head, overwrite=True)
    assert len(predict.asked[-1]) == 4


def test_the_threshold_is_of_the_run(predict, spread_base, tmp_path):
    folder = write_dense(spread_base, tmp_path / "binary", "binary")
    shares = []
    for threshold in (0.2, 0.8):
        predict(adapter=folder, post={"threshold": threshold}, overwrite=True)
        with Image.open(tmp_path / "out/labels/a.png.png") as labels:
            shares.append(np.array(labels).mean())
    assert shares[1] < shares[0]
    with pytest.raises(UserError, match="other settings"):
        predict(adapter=folder)


def test_an_image_that_fails_is_named(predict, images, monkeypatch):
    cv2.imwrite(str(images / "white.png"), np.full((40, 40, 3), 255, np.uint8))
    attempt = DenseEngine._logits

    def failing(self, batch):
        if any(image.min() == 255 for image in batch):
            raise RuntimeError("it cannot be")
        return attempt(self, batch)

    monkeypatch.setattr(DenseEngine, "_logits", failing)
    reasons = {bad["file_name"]: bad["reason"] for bad in predict().bad_images}
    assert reasons.keys() == {"text.png", "white.png"}
    assert reasons["white.png"] == "RuntimeError: it cannot be"


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        (["crack"], {}, "--prompt"),
        ([], {"post": {"nms": "box"}}, "nms has no effect"),
        ([], {"post": {"threshold": 0.4}}, "threshold has no effect"),
    ],
)
def test_options_without_effect(predict, tmp_path, prompts, options, words):
    with pytest.raises(UserError, match=words):
        predict(*prompts, **options)
    assert not (tmp_path / "out").exists()
