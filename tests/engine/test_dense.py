"""The engine of dense folders: the logits that training measures, whatever the batch, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sam3lora.data.images import read_image
from sam3lora.data.sample import DecodeSettings
from sam3lora.engine.dense import DenseEngine
from sam3lora.engine.selection import NotFiniteError
from sam3lora.errors import UserError
from sam3lora.training.dense.runner import DenseImages

from ..model.conftest import write_adapter
from ..model.dense.dense_cases import write_dense


@pytest.fixture(scope="module")
def folder(spread_base, tmp_path_factory) -> Path:
    return write_dense(spread_base, tmp_path_factory.mktemp("dense") / "best")


@pytest.fixture(scope="module")
def engine(folder) -> DenseEngine:
    return DenseEngine.load(folder, device="cpu")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, 90, 3), dtype=np.uint8) for height in (60, 160, 112)]


def test_the_logits_are_those_that_training_measures(engine, images, tmp_path):
    settings = DecodeSettings(names=(), resolution=engine.base.resolution)
    measured = DenseImages(
        engine.model,
        device=engine.device,
        settings=settings,
        image_mean=engine.base.image_mean,
        image_std=engine.base.image_std,
    )
    for number, image in enumerate(images):
        path = tmp_path / f"{number}.png"
        cv2.imwrite(str(path), image)
        height, width = image.shape[:2]
        with torch.no_grad():
            tokens = measured.of_records([{"path": str(path), "height": height, "width": width}])
            expected = engine.model.logits(tokens)[0][0].numpy()
        (found,) = engine.logits([read_image(path)])
        assert np.array_equal(found, expected)
        assert found.std() > 0.1


def test_an_image_does_not_depend_on_the_others(engine, images):
    together = engine.logits(images)
    assert engine.logits([]) == []
    assert together[0].shape == (3, 4 * 8, 4 * 8)
    for image, logits in zip(images, together, strict=True):
        np.testing.assert_allclose(engine.logits([image])[0], logits, atol=1e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_halves_where_memory_runs_out(engine, images, monkeypatch):
    expected, forward, asked = engine.logits(images), engine.model.forward, []

    def small(most: int) -> None:
        def attempt(pixel_values):
            asked.append(len(pixel_values))
            if len(pixel_values) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(pixel_values)

        monkeypatch.setattr(engine.model, "forward", attempt)

    small(1)
    np.testing.assert_allclose(engine.logits(images), expected, atol=1e-3)
    assert asked == [3, 1, 2, 1, 1]
    small(0)
    with pytest.raises(UserError, match="single image"):
        engine.logits(images)


def test_bfloat16_gives_nearly_the_same(folder, engine, images):
    half = DenseEngine.load(folder, device="cpu", precision="bfloat16")
    for ours, theirs in zip(half.logits(images), engine.logits(images), strict=True):
        assert ours.dtype == np.float32
        assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


def test_what_is_refused(folder, spread_base, tmp_path, images):
    for resolution, words in ((224, "resolution 112"), (100, "multiple of")):
        with pytest.raises(UserError, match=words):
            DenseEngine.load(folder, resolution=resolution, device="cpu")
    with pytest.raises(UserError, match="not of task dense"):
        DenseEngine.load(write_adapter(spread_base, tmp_path / "prompts"), device="cpu")
    diverged = DenseEngine.load(folder, device="cpu")
    diverged.model.dense_head.outputs[0].bias.data.fill_(3e38).mul_(10)
    with pytest.raises(NotFiniteError):
        diverged.logits(images)
