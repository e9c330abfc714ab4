"""Kept features and frames change what a run costs and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3lora.data import sample
from sam3lora.engine.features import to_pixel_values
from sam3lora.errors import UserError
from sam3lora.model.loading import load_base
from sam3lora.training import validator as metrics_module
from sam3lora.training.features.memory import FeatureMemory
from sam3lora.training.launch import train
from sam3lora.training.validator import ask_split

from .changed_scenes import with_broken_images
from .feature_cases import (
    BF16,
    FROZEN,
    LAST_LAYER,
    NECK,
    NECK_ONLY,
    NUM_TRAIN,
    NUM_VALID,
    OFF,
    ON_DISK,
    arrays,
    counts_of,
    feature_files,
    record_decoding,
    step_of,
)
from .run_folder import assert_equal, lines_of, passes_of, without_measures
from .two_workers import make_trainer

# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "stored"),
    [
        pytest.param([FROZEN], np.float32, id="frozen"),
        pytest.param([FROZEN, BF16], np.uint16, id="frozen-autocast"),
        pytest.param([*NECK_ONLY, BF16], np.float32, id="neck-autocast"),
        pytest.param([LAST_LAYER, BF16], np.float32, id="last-layer-autocast"),
        pytest.param([LAST_LAYER], np.float32, id="last-layer", marks=pytest.mark.slow),
        pytest.param(NECK_ONLY, np.float32, id="neck", marks=pytest.mark.slow),
        pytest.param([FROZEN, BF16, "model.dtype=bfloat16"], np.uint16, id="frozen-bfloat16", marks=pytest.mark.slow),
        pytest.param([*NECK_ONLY, BF16, "model.dtype=bfloat16"], np.uint16, id="neck-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_kept_features_give_the_same_gradients(make_config, cache_folder, overrides, stored):
    # Equal bits, when the features are made and when they are read; with dropout in the adapter, and with more
    # prompts than fit a forward. bfloat16 is kept only where nothing behind it sees the difference.
    common = [*overrides, "lora.dropout=0.3"]
    plain = make_trainer(make_config(OFF, *common, max_prompts_per_forward=2))
    expected, expected_terms = step_of(plain)
    assert any(".neck." in name for name in expected) == (NECK in overrides)
    expected_valid = plain.validator.loss_terms().means()
    assert not cache_folder.exists()
    worker = make_trainer(make_config(*common, max_prompts_per_forward=2))
    for seen in (  # read from memory
        [(2, 0), (2 + NUM_VALID, 0)],
        [(2 + NUM_VALID, 2), (2 + NUM_VALID, 2 + NUM_VALID)],
    ):
        gradients, terms = step_of(worker)
        assert_equal(gradients, expected)
        assert_equal(terms, expected_terms)
        assert counts_of(worker) == seen[0]
        assert worker.validator.loss_terms().means() == expected_valid
        assert counts_of(worker) == seen[1]
    assert {(array.shape, array.dtype) for array in arrays(cache_folder)} == {((64, 32), np.dtype(stored))}
    assert len(arrays(cache_folder)) == 2 + NUM_VALID


def test_a_second_run_sees_no_image_again(make_config, monkeypatch):
    # Nor does it decode one. All it logs is what a run without the cache logs.
    decoded = record_decoding(monkeypatch)
    runs = [make_config(*more, FROZEN, "evaluation.every_epochs=1", output=name) for name, more in
            {"plain": [OFF], "first": [], "second": []}.items()]  # fmt: skip
    seen = []
    for config in runs:
        train(config)
        seen.append(len(decoded))
    plain, first, second = runs
    # The base, two epochs, and validation with metrics twice.
    total = NUM_VALID + 2 * (NUM_TRAIN + 2 * NUM_VALID)
    assert passes_of(plain) == (total, 0)
    assert passes_of(first) == (NUM_TRAIN + NUM_VALID, total - NUM_TRAIN - NUM_VALID)
    assert passes_of(second) == (0, total)
    assert [seen[0], seen[1] - seen[0], seen[2] - seen[1]] == [total, NUM_TRAIN + NUM_VALID, 0]
    # A run that is stopped has said so before its end.
    assert [line["vision_passes"] for line in lines_of(first, "epoch")] == [NUM_TRAIN + NUM_VALID] * 2
    assert [line["features_loaded"] for line in lines_of(second, "epoch")] == [
        NUM_VALID + NUM_TRAIN + 2 * NUM_VALID,
        total,
    ]
    for kind in ("step", "epoch"):
        expected = [without_measures(line) for line in lines_of(plain, kind)]
        for config in (first, second):
            assert [without_measures(line) for line in lines_of(config, kind)] == expected


def test_metrics_from_kept_features(make_config, monkeypatch):
    # The same detections, score for score.
    answers = []
    monkeypatch.setattr(
        metrics_module, "ask_split", lambda *args, **more: answers.append(ask_split(*args, **more)) or answers[-1]
    )
    worker = make_trainer(make_config(FROZEN))
    for asked in (make_trainer(make_config(FROZEN, OFF, output="plain")), worker, worker):
        asked.validator.metrics()
    plain, made, read = answers
    assert plain.num_predictions > 10
    for kept in (made, read):
        assert np.array_equal(kept.table.score_D, plain.table.score_D)
        assert np.array_equal(kept.table.matched_DK, plain.table.matched_DK)
        assert np.array_equal(kept.presence_IC, plain.presence_IC)
    assert counts_of(worker) == (NUM_VALID, NUM_VALID)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_trunk_adapted_from_the_first_layer_on_keeps_nothing(make_config, cache_folder):
    train(make_config("lora.vision_last_layers=3", num_epochs=1))
    assert not cache_folder.exists()


def test_augmented_training_keeps_the_features_of_validation(make_config, cache_folder):
    # The training images look different in every epoch: they go through the trunk each time.
    config = make_config(FROZEN, "data.augmentation=sam3")
    train(config)
    assert len(arrays(cache_folder)) == NUM_VALID
    assert passes_of(config) == (2 * NUM_TRAIN + NUM_VALID, 2 * NUM_VALID)
    mirrored = make_config(FROZEN, "data.horizontal_flip=0.5", output="mirrored")
    train(mirrored)
    assert passes_of(mirrored) == (2 * NUM_TRAIN, 3 * NUM_VALID)


@pytest.mark.slow
def test_what_gives_other_features_has_its_own(make_config, small_base, cache_folder):
    # Other weights, input size or arithmetic share nothing; another adapter or learning rate everything.
    def passes(*overrides) -> int:
        worker = make_trainer(make_config(FROZEN, *overrides))
        step_of(worker)
        return counts_of(worker)[0]

    assert passes() == 2
    assert passes("lora.rank=8", "training.learning_rate=1e-5", "training.loss.giou=0") == 0
    assert passes("model.resolution=56") == 2
    assert passes(BF16) == 2
    assert passes("lora.apply_to_vision_encoder=true", LAST_LAYER) == 2
    assert passes("model.attention=eager") == 2
    assert passes(f"model.name={small_base}") == 2
    assert passes("model.dtype=bfloat16", BF16) == 2
    assert len(arrays(cache_folder)) == 14


def test_pixels_are_normalised_as_the_base_says(make_config, lively_base, tmp_path, cache_folder):
    # Exactly as `validate` does it, whatever mean and standard deviation the processor has; features are not shared.
    folder = shutil.copytree(lively_base, tmp_path / "other")
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.4, 0.7]}})
    )
    frames = np.arange(112 * 112 * 3, dtype=np.uint8).reshape(1, 112, 112, 3)
    for name, passes in ((lively_base, 2), (folder, 4)):
        trainer = make_trainer(make_config(FROZEN, f"model.name={name}"))
        base = load_base(str(name))
        expected = to_pixel_values([frames[0]], 112, image_mean=base.image_mean, image_std=base.image_std)
        assert torch.equal(trainer.runner.images.pixel_values(frames), expected)
        step_of(trainer)
        assert len(arrays(cache_folder)) == passes
    assert base.image_std == (0.3, 0.4, 0.7)


def test_changed_image_is_seen_anew(make_config, scenes, tmp_path, cache_folder):
    # The same path with another picture, and the same picture under another path.
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    config = make_config(FROZEN, data_dir=str(data), batch_size=NUM_TRAIN)
    worker = make_trainer(config)
    step_of(worker)
    first, second, *_ = sorted((data / "train").glob("*.jpg"))
    shutil.copy(second, first)
    gradients, _ = step_of(worker)
    assert counts_of(worker) == (NUM_TRAIN, NUM_TRAIN)  # the second picture's features are there
    expected, _ = step_of(make_trainer(make_config(FROZEN, OFF, data_dir=str(data), batch_size=NUM_TRAIN)))
    assert_equal(gradients, expected)
    image = sample.read_image(first)
    shutil.copy(sorted((data / "valid").glob("*.jpg"))[0], first)
    assert not np.array_equal(sample.read_image(first), image)
    step_of(worker)
    assert counts_of(worker) == (NUM_TRAIN + 1, NUM_TRAIN + NUM_TRAIN - 1)


@pytest.mark.parametrize("how", ["damaged", "removed", "another shape"])
def test_features_that_are_gone_by_the_time_they_are_needed(make_config, cache_folder, how):
    # The batch came without pixels; the image is read once more, and what was made takes the place of the file.
    worker = make_trainer(make_config(FROZEN, ON_DISK))
    expected, _ = step_of(worker)
    batch = next(worker.batches.training_batches(0, 0))
    assert (batch.num_images, len(batch.images_NHWC)) == (2, 0)
    worker.runner.images.trunk.memory = FeatureMemory(0)  # nothing was read ahead
    for file in feature_files(cache_folder):
        if how == "damaged":
            file.write_bytes(file.read_bytes()[:300])
        elif how == "removed":
            file.unlink()
        else:
            np.save(file, np.zeros((4, 4), dtype=np.float32))
    worker.batches.training_batches = lambda *arguments: (one for one in [batch])
    gradients, _ = step_of(worker)
    assert_equal(gradients, expected)
    assert counts_of(worker) == (4, 0)
    step_of(worker)
    assert counts_of(worker) == (4, 2)


def test_bad_images_with_kept_features(make_config, scenes, tmp_path):
    # They are left out and named in each run, or stop it, as without the cache.
    data = with_broken_images(scenes, tmp_path / "data", "train/00002.jpg")
    for name in ("first", "second"):
        config = make_config(FROZEN, data_dir=str(data), num_epochs=1, on_bad_image="skip", output=name)
        train(config)
        assert [Path(line["path"]).name for line in lines_of(config, "skipped_image")] == ["00002.jpg"]
    assert passes_of(config) == (0, NUM_TRAIN - 1 + 2 * NUM_VALID)
    with pytest.raises(UserError, match=r"train/00002\.jpg"):
        train(make_config(FROZEN, data_dir=str(data), output="third"))
