"""Kept frames, runs at the same time, and runs that can keep nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sam3lora.data.array_store import ArrayStore
from sam3lora.errors import UserError
from sam3lora.training.launch import train

from .feature_cases import (
    FROZEN,
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
from .run_folder import assert_equal, lines_of, passes_of
from .two_workers import make_trainer

# ---- frames ----------------------------------------------------------------------------------------------------------


def test_kept_frames_are_the_decoded_ones(make_config, cache_folder, monkeypatch):
    # For runs that adapt the trunk: each image is decoded once for all of them.
    decoded = record_decoding(monkeypatch)
    on = "training.frame_cache=true"
    expected, _ = step_of(make_trainer(make_config()))
    decoded.clear()
    for more in ([], [], ["lora.rank=2"]):
        gradients, _ = step_of(make_trainer(make_config(on, *more)))
        if not more:
            assert_equal(gradients, expected)
        # Batches are decoded ahead of use, how many depends.
        assert 2 <= len(decoded) == len(set(decoded)) == len(arrays(cache_folder))
    assert {(array.shape, array.dtype) for array in arrays(cache_folder)} == {((112, 112, 3), np.dtype(np.uint8))}
    # Validation and its metrics share theirs, also where training is augmented.
    num_kept = len(arrays(cache_folder)) + NUM_VALID
    decoded.clear()
    augmented = make_trainer(make_config(on, "data.augmentation=sam3"))
    augmented.validator.loss_terms()
    augmented.validator.metrics()
    assert len(decoded) == NUM_VALID
    step_of(augmented)
    step_of(augmented)
    assert len(decoded) >= NUM_VALID + 4
    assert len(arrays(cache_folder)) == num_kept


def test_frames_are_not_kept_beside_features(make_config, cache_folder):
    step_of(make_trainer(make_config(FROZEN, "training.frame_cache=true")))
    assert {array.shape for array in arrays(cache_folder)} == {(64, 32)}


# ---- where it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], r"the adapter changes the vision trunk \(\d+ modules, first vision_encoder\.backbone\..*last_layers"),
        ([FROZEN, "data.augmentation=sam3"], r"data\.augmentation and data\.horizontal_flip change"),
        ([FROZEN, "data.horizontal_flip=0.1"], r"data\.augmentation and data\.horizontal_flip change"),
    ],
)
def test_asked_for_where_it_cannot_be(make_config, overrides, reason):
    with pytest.raises(UserError, match=rf"training\.feature_cache is true, but {reason}.*Write auto"):
        make_trainer(make_config("training.feature_cache=true", *overrides))


def test_trunk_with_dropout(make_config, lively_base, tmp_path, cache_folder):
    # Only training.model_dropout switches it on.
    folder = shutil.copytree(lively_base, tmp_path / "dropout")
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["vision_config"]["backbone_config"]["hidden_dropout"] = 0.1
    file.write_text(json.dumps(content))
    common = (FROZEN, f"model.name={folder}")
    with pytest.raises(UserError, match=r"training\.model_dropout is on"):
        make_trainer(make_config("training.feature_cache=true", "training.model_dropout=true", *common))
    step_of(make_trainer(make_config("training.model_dropout=true", *common)))
    assert not cache_folder.exists()
    step_of(make_trainer(make_config(*common)))
    assert len(arrays(cache_folder)) == 2


def test_folder_that_cannot_be_written(make_config, tmp_path, caplog):
    (tmp_path / "file").write_text("mine")
    there = f"training.cache_dir={tmp_path / 'file'}"
    config = make_config(FROZEN, there, num_epochs=1)
    train(config)
    assert caplog.text.count("cannot be written") == 1
    assert passes_of(config)[1] == 0
    with pytest.raises(UserError, match=r"cannot be written .* name another by training\.cache_dir"):
        make_trainer(make_config("training.feature_cache=true", FROZEN, there))


# ---- several at once -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
from sam3lora.config import load_config
from sam3lora.training.trainer import Trainer

config = load_config(sys.argv[1])
trainer = Trainer(config, Path(sys.argv[1]).parent, use_ray=False)
(Path(sys.argv[1]).parent / "ready").touch()
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
trainer.run()
"""


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(make_config, tmp_path, cache_folder):
    # They ask for the same images in the same order at the same time, and each image goes through the trunk once.
    configs, runs, go = [], [], tmp_path / "go"
    for name in ("one", "two"):
        config = make_config(FROZEN, output=name, batch_size=3)
        folder = Path(config.output.output_dir)
        folder.mkdir()
        (folder / "config.yaml").write_text(config.to_yaml())
        command = [sys.executable, "-c", SCRIPT, str(folder / "config.yaml"), str(go)]
        runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)))
        configs.append(config)
    until = time.monotonic() + 120
    while not all((Path(config.output.output_dir) / "ready").exists() for config in configs):
        assert time.monotonic() < until
        assert [run.poll() for run in runs] == [None, None]
        time.sleep(0.05)
    go.touch()
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors)
    (passes, loaded), (other_passes, other_loaded) = map(passes_of, configs)
    assert passes + other_passes == NUM_TRAIN + NUM_VALID
    assert passes + loaded == other_passes + other_loaded == 3 * NUM_VALID + 2 * NUM_TRAIN
    assert len(arrays(cache_folder)) == NUM_TRAIN + NUM_VALID


def test_waiting_for_another_runs_image(make_config, cache_folder, monkeypatch):
    # One of two images is being made elsewhere: the other is made first, then that one is read, not made.
    worker = make_trainer(make_config(FROZEN, ON_DISK))
    step_of(worker)
    [first, second] = feature_files(cache_folder)
    elsewhere = shutil.move(second, cache_folder / "elsewhere")
    first.unlink()
    key = second.parent.name + second.stem
    claims, claim = [], ArrayStore.claim

    def contended(store, wanted, *, wait=False):
        claims.append((wanted == key, wait))
        if wanted == key and wait:
            assert first.is_file()
            shutil.move(elsewhere, second)
        return claim(store, wanted, wait=wait) if wanted != key or wait else contextlib.nullcontext(False)

    monkeypatch.setattr(ArrayStore, "claim", contended)
    step_of(worker)
    assert sorted(claims[:2]) == [(False, False), (True, False)]
    assert claims[2:] == [(True, True)]
    assert counts_of(worker) == (3, 1)


@pytest.mark.slow
def test_ray_workers_share_the_work(make_config, cache_folder, monkeypatch):
    # Two workers, each with data tasks in other processes; what they log is the sum of both.
    common = [FROZEN, "scaling.num_workers=2", "training.num_workers=1", "scaling.resources_per_worker={CPU: 0.5}"]
    total = 3 * NUM_VALID + 2 * NUM_TRAIN
    plain = make_config(FROZEN, OFF, "training.adam_epsilon=0.1", output="plain")
    train(plain)
    for name, expected in (("first", (NUM_TRAIN + NUM_VALID, total - NUM_TRAIN - NUM_VALID)), ("second", (0, total))):
        config = make_config(*common, "training.adam_epsilon=0.1", batch_size=1, output=name)
        train(config)
        assert passes_of(config) == expected
        assert [line["vision_passes"] for line in lines_of(config, "epoch")] == [expected[0]] * 2
        losses, plain_losses = ([line["valid_loss"] for line in lines_of(run, "epoch")] for run in (config, plain))
        assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert len(arrays(cache_folder)) == NUM_TRAIN + NUM_VALID
