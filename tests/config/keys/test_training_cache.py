"""Keys of `training` that decide what is kept on disk between epochs and runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sam3lora.config import load_config
from sam3lora.errors import UserError

from .conftest import acts, batches_of_an_epoch, loss_terms


def files_in(folder: Path) -> list[Path]:
    return list(folder.glob("??/*.npy"))


def passes(worker) -> int:
    """Images through the vision trunk in an epoch."""
    before = worker.runner.images.vision_passes
    for batch in batches_of_an_epoch(worker):
        loss_terms(worker, batch)
    return worker.runner.images.vision_passes - before


@acts("training.feature_cache")
def test_feature_cache_spares_the_vision_trunk(build, cache_folder):
    off = build("training.feature_cache=false")
    assert [passes(off), passes(off)] == [4, 4]
    assert not cache_folder.exists()
    for value in ("auto", "true"):
        worker = build(f"training.feature_cache={value}", f"training.cache_dir={cache_folder / value}")
        assert [passes(worker), passes(worker)] == [4, 0]
    with pytest.raises(UserError, match="the adapter changes the vision trunk"):
        build("training.feature_cache=true", "lora.apply_to_vision_encoder=true")
    with pytest.raises(UserError, match=r'training\.feature_cache.*should be "auto", true or false'):
        load_config("light", ["training.feature_cache=maybe"])


@acts("training.feature_cache_type")
def test_feature_cache_type_decides_how_many_bytes_are_kept(build, cache_folder):
    # 64 tokens of 32 values: 4 bytes each, or 1 and a scale of 4 bytes for each token.
    for value, num_bytes in (("auto", 64 * 32 * 4), ("int8", 64 * (32 + 4))):
        folder = cache_folder / value
        passes(build(f"training.feature_cache_type={value}", f"training.cache_dir={folder}"))
        assert sum(file.stat().st_size == 128 + num_bytes for file in files_in(folder)) == 4
    with pytest.raises(UserError, match="feature_cache_type has no effect while feature_cache is false"):
        load_config("light", ["training.feature_cache=false", "training.feature_cache_type=int8"])


@acts("training.cache_memory_gb")
def test_cache_memory_gb_bounds_what_stays_in_memory(build):
    # Room for none, two or all of the four images, which take 8 KB each.
    for value, num_images in (("0", 0), ("2e-5", 2), ("1", 4)):
        worker = build(f"training.cache_memory_gb={value}")
        passes(worker)
        assert worker.runner.images.trunk.memory.num_bytes == num_images * 8192
    with pytest.raises(UserError, match="cache_memory_gb has no effect while feature_cache is false"):
        load_config("light", ["training.feature_cache=false", "training.cache_memory_gb=2"])


@acts("training.frame_cache")
def test_frame_cache_keeps_decoded_images(build, cache_folder):
    off = ("training.feature_cache=false",)
    batches_of_an_epoch(build(*off))
    assert not cache_folder.exists()
    batches_of_an_epoch(build(*off, "training.frame_cache=true"))
    # A frame and the digest of its file for each of the four images.
    assert len(files_in(cache_folder)) == 8
    assert sum(file.stat().st_size > 112 * 112 * 3 for file in files_in(cache_folder)) == 4


@acts("training.cache_dir")
def test_cache_dir_comes_before_the_environment_and_the_home(build, tmp_path, cache_folder, monkeypatch):
    named, home = tmp_path / "named", tmp_path / "home"
    loss_terms(build(f"training.cache_dir={named}"))
    assert files_in(named)
    assert not cache_folder.exists()
    loss_terms(build())
    assert files_in(cache_folder)
    assert Path(os.environ["SAM3LORA_CACHE"]) == cache_folder
    monkeypatch.delenv("SAM3LORA_CACHE")
    monkeypatch.setenv("HOME", str(home))
    loss_terms(build())
    assert files_in(home / ".cache" / "sam3lora")


@acts("training.cache_gb")
def test_cache_gb_bounds_the_folder(build, cache_folder):
    # The features of an image take 8 KB here; what earlier runs left makes room.
    for seed in (1, 2):
        worker = build("training.cache_gb=2e-5", f"training.seed={seed}")
        assert passes(worker) >= 2
        assert 8192 < sum(file.stat().st_size for file in files_in(cache_folder)) <= 2e4
    assert passes(build("training.cache_gb=1", f"training.cache_dir={cache_folder / 'large'}")) == 4
    with pytest.raises(UserError, match=r"training\.cache_gb"):
        load_config("light", ["training.cache_gb=0"])
