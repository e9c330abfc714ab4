"""`Predictor` on a dense folder: labels as the engine gives them, and which questions go to which adapter."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam3lora import Predictor
from sam3lora.errors import UserError

from ...model.conftest import write_adapter
from ...model.dense.dense_cases import write_dense


@pytest.fixture(scope="module")
def folder(spread_base, tmp_path_factory) -> Path:
    return write_dense(spread_base, tmp_path_factory.mktemp("dense") / "best")


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    return Predictor(adapter=folder, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def test_labels_of_an_image(predictor, pixels, tmp_path):
    result = predictor.predict_dense(pixels)
    assert result.classes == ("background", "gear", "red bolt")
    assert (result.label_HW.shape, result.label_HW.dtype) == ((60, 90), np.uint8)
    assert len(np.unique(result.label_HW)) > 1
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), pixels[..., ::-1])
    assert np.array_equal(predictor.predict_dense(path).label_HW, result.label_HW)
    assert result.draw(tmp_path / "p.png").shape[1] == 4 * 90
    described = json.loads(json.dumps(predictor.settings))
    assert (described["task"], described["resolution"], described["classes"][1]) == ("dense", 112, "gear")
    assert "threshold" not in described


def test_many_images_are_asked_together(predictor, pixels, monkeypatch):
    images = [pixels, pixels[::-1].copy(), pixels[:30].copy()]
    alone = [predictor.predict_dense(image) for image in images]
    sizes, attempt = [], predictor._dense.engine._logits
    monkeypatch.setattr(predictor._dense.engine, "_logits", lambda batch: sizes.append(len(batch)) or attempt(batch))
    together = predictor.predict_dense_many(images, batch_size=2)
    assert sizes == [2, 1]
    for one, other, image in zip(together, alone, images, strict=True):
        np.testing.assert_allclose(one.logits_Nhw, other.logits_Nhw, atol=1e-3)
        assert one.image_HW3 is image
    assert predictor.predict_dense_many([]) == []


def test_the_threshold_that_counts(spread_base, pixels, tmp_path):
    folder = write_dense(spread_base, tmp_path / "best", "binary", lora=False, threshold=0.3)
    recorded, asked = Predictor(adapter=folder, device="cpu"), Predictor(adapter=folder, device="cpu", threshold=0.9)
    assert (recorded.settings["threshold"], asked.settings["threshold"]) == (0.3, 0.9)
    probability = recorded.predict_dense(pixels).probability("crack")
    for predictor, threshold in ((recorded, 0.3), (asked, 0.9)):
        assert np.array_equal(predictor.predict_dense(pixels).mask("crack"), probability >= threshold)
    assert 0 < (probability >= 0.9).sum() < (probability >= 0.3).sum()


def test_questions_of_the_other_task(predictor, pixels, spread_base, tmp_path):
    for ask in (
        lambda: predictor.predict(pixels, "crack"),
        lambda: predictor.predict_many([pixels], "crack"),
        lambda: predictor.interact(pixels),
    ):
        with pytest.raises(UserError, match="predict_dense"):
            ask()
    prompted = write_adapter(spread_base, tmp_path / "prompts")
    for other in (Predictor(adapter=prompted, device="cpu"), Predictor(str(spread_base), device="cpu")):
        with pytest.raises(UserError, match=r"Use predict$"):
            other.predict_dense(pixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.3}, "threshold has no effect"),
        ({"nms": "box"}, "nms has no effect"),
        ({"geometry_cls": False}, "geometry_cls has no effect"),
        ({"resolution": 224}, "resolution 112"),
    ],
)
def test_settings_without_effect(folder, options, words):
    with pytest.raises(UserError, match=words):
        Predictor(adapter=folder, device="cpu", **options)


def test_a_folder_without_its_head(folder, tmp_path):
    broken = tmp_path / "best"
    broken.mkdir()
    (broken / "sam3lora.json").write_bytes((folder / "sam3lora.json").read_bytes())
    with pytest.raises(UserError, match="lacks dense_head"):
        Predictor(adapter=broken)
