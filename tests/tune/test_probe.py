"""The two steps that a cost estimate rests on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sam3lora.config import Config, load_config
from sam3lora.data.synth.dataset import write_dataset
from sam3lora.errors import OutOfMemory, RunFailed, UserError
from sam3lora.tune.estimate import probe as probe_module
from sam3lora.tune.estimate.probe import ImageCost, run_probe


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """6 training and 3 validation images; read only."""
    folder = tmp_path_factory.mktemp("probe") / "data"
    return write_dataset(folder, num_train=6, num_valid=3, size=112, seed=4, progress=False)


@pytest.fixture
def make_config(small_base, images, tmp_path, monkeypatch):
    """A configuration for a small random SAM 3, with changes `a.b=c`."""
    monkeypatch.setattr(probe_module, "_import_seconds", lambda: 5.0)  # a process that imports torch takes seconds

    def make(*overrides: str) -> Config:
        source = {
            "model": {"name": str(small_base)},
            "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"], "apply_to_detr_decoder": True},
            "training": {
                "data_dir": str(images),
                "batch_size": 2,
                "mixed_precision": "no",
                "loss": {"mask_resolution": "low"},
            },
            "scaling": {"num_workers": 0, "use_gpu": False},
            "output": {"output_dir": str(tmp_path / "run")},
        }
        return load_config(source, overrides)

    return make


def test_what_is_measured(make_config, tmp_path):
    probe = run_probe(make_config("training.frame_cache=true", "evaluation.every_epochs=1"))
    assert (probe.num_train, probe.num_valid, probe.num_measured) == (6, 3, 3)
    assert probe.device == "the CPU with 1 thread"
    assert probe.start_s > 5
    for cost in (probe.train, probe.valid, probe.first_train, probe.first_valid):
        assert cost.compute_s > 0
        assert cost.decode_s > 0
    assert probe.metrics_s > 0
    assert probe.memory_mb > 100  # torch alone
    # 8 x 8 patches of 32 values of 4 bytes
    assert probe.uses_features
    assert probe.cache_bytes > 8 * 8 * 32 * 4
    # nothing is left, neither in the run folder nor in the cache that trials share
    assert list(tmp_path.iterdir()) == []


def test_adapted_vision_is_computed_each_time(make_config):
    probe = run_probe(make_config("lora.apply_to_vision_encoder=true", "training.gradient_accumulation_steps=100"))
    assert not probe.uses_features
    assert probe.cache_bytes == 0
    assert (probe.metrics_s, probe.num_measured) == (None, 0)


def test_without_validation_images(make_config, images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "data" / "train")
    probe = run_probe(make_config(f"training.data_dir='{tmp_path / 'data'}'", "evaluation.every_epochs=1"))
    assert (probe.num_valid, probe.valid, probe.metrics_s) == (0, ImageCost(), None)


def test_threads_are_those_of_a_worker(make_config, monkeypatch):
    seen = []

    def look(config, folder):
        seen.append(torch.get_num_threads())
        return None

    monkeypatch.setattr(probe_module, "_measure", look)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_probe(make_config())
        # 4 CPUs, of which 2 decode; no more than there are
        run_probe(make_config("scaling.num_workers=2", "scaling.resources_per_worker={CPU: 4}"))
        run_probe(make_config("scaling.num_workers=2", "scaling.resources_per_worker={CPU: 40}"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 3]


def test_out_of_memory_says_what_to_change(make_config, monkeypatch):
    def fail(worker, group):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(probe_module, "optimizer_step", fail)
    with pytest.raises(OutOfMemory, match=r"training\.batch_size=2: set it to 1, or .*gradient_checkpointing"):
        run_probe(make_config())


def test_unreadable_image(make_config, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    for image in (data / "train").glob("*.jpg"):
        image.write_bytes(b"no image")
    with pytest.raises(RunFailed, match=r"\.jpg.*on_bad_image=skip"):
        run_probe(make_config(f"training.data_dir='{data}'"))


def test_wrong_settings_are_the_users(make_config, images, tmp_path):
    with pytest.raises(UserError, match="no folder at"):
        run_probe(make_config(f"training.data_dir='{tmp_path / 'nowhere'}'"))
    with pytest.raises(UserError, match="feature_cache is true, but"):
        run_probe(make_config("training.feature_cache=true", "lora.apply_to_vision_encoder=true"))


def test_image_cost():
    cost = ImageCost(decode_s=0.3, compute_s=0.2)
    assert cost.seconds(0) == pytest.approx(0.5)  # one after the other
    assert cost.seconds(1) == pytest.approx(0.3)  # side by side: the slower one counts
    assert cost.seconds(2) == pytest.approx(0.2)
