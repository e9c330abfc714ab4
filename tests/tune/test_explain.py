"""`--explain` shows what a sweep would try and cost, and leaves nothing behind."""

from __future__ import annotations

import io
import re
import shutil

import pytest
import yaml
from rich.console import Console

from sam3lora.config import load_config
from sam3lora.errors import OutOfMemory, UserError
from sam3lora.tune.estimate import probe as probe_module
from sam3lora.tune.estimate.explain import explain_sweep
from sam3lora.tune.estimate.probe import ImageCost, Probe
from sam3lora.tune.estimate.sweep_cost import feature_bytes, why_not_kept
from sam3lora.tune.estimate.sweep_time import expected_share
from sam3lora.tune.run import capacity
from sam3lora.tune.search.proposals import propose_all
from sam3lora.tune.space.reader import SearchSpace, load_space

PROBE = Probe(
    device="the GPU (of a test)",
    num_train=100,
    num_valid=20,
    start_s=10.0,
    train=ImageCost(0.0, 0.5),
    valid=ImageCost(0.0, 0.25),
    first_train=ImageCost(0.0, 0.5),
    first_valid=ImageCost(0.0, 0.25),
    metrics_s=0.25,
    num_measured=20,
    memory_mb=2048.0,
    cache_bytes=1e6,
    uses_features=True,
)


@pytest.fixture
def make_space(small_base, tmp_path):
    """A search space on a small random SAM 3, whose vision encoder stays frozen."""

    def make(parameters: str, *overrides: str, **sections: str) -> SearchSpace:
        base = {
            "model": {"name": str(small_base)},
            "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "apply_to_detr_decoder": True},
            "training": {"batch_size": 2, "num_epochs": 9, "mixed_precision": "no", "loss": {"mask_resolution": "low"}},
            "scaling": {"num_workers": 0, "use_gpu": False},
            "output": {"output_dir": str(tmp_path / "never")},
        }
        parts = {name: yaml.safe_load(text) for name, text in sections.items()}
        return load_space({"base": base, "parameters": yaml.safe_load(parameters), **parts}, overrides=overrides)

    return make


def explained(space: SearchSpace, **options) -> str:
    text = io.StringIO()
    explain_sweep(space, console=Console(file=text, width=160, markup=False, highlight=False), **options)
    return text.getvalue()


def rows_under(text: str, heading: str) -> list[list[str]]:
    """The cells of the rows after the heading of a table, up to an empty line."""
    start = re.search(rf"^ *{heading}", text, re.MULTILINE)
    assert start
    lines = text[start.start() :].splitlines()[1:]
    end = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[:end]]


def largest_of(text: str) -> str:
    """Number of the trial of rank 8 in the table of samples."""
    return next(row[0] for row in rows_under(text, "trial ") if row[1] == "8")


RANKS = "lora.rank: {choice: [2, 4, 8]}"


def test_grid(make_space, monkeypatch):
    monkeypatch.setattr(capacity.os, "cpu_count", lambda: 2)
    space = make_space(
        f"{RANKS}\nlora.alpha: {{tied: 2 * lora.rank}}\ncomponents: {{choice: [decoder, vision, detr]}}",
        search="{algorithm: grid}",
        constraints="{max_trainable_parameters: 4000}",
        early_stopping="{grace_epochs: 1, reduction_factor: 2}",
    )
    text = explained(space)
    proposals, rejections = propose_all(space)
    assert rows_under(text, "parameter ") == [
        ["lora.rank", "choice", "2; 4; 8", "4"],
        ["lora.alpha", "tied", "= 2 * lora.rank", "8"],
        ["components", "choice", "decoder; vision; detr", "decoder"],
    ]
    assert "  detr = detr_encoder, detr_decoder" in text
    assert "at most 4,000 trainable parameters" in text
    assert "ASHA compares after epoch 1, 2, 4, 8:" in text
    # the real proposals, each with its parameters
    rows = rows_under(text, "trial ")
    shown = [
        [
            f"{found.number} base" if found.is_base else str(found.number),
            *(space.label(key, value) for key, value in found.values.items()),
            f"{found.trainable_parameters:,}",
        ]
        for found in proposals
    ]
    assert [row for row in rows if row[0][0].isdigit()] == shown
    counts = sorted(proposal.trainable_parameters for proposal in proposals)
    assert f"Trainable   {counts[0]:,} to {counts[-1]:,} parameters, median" in text
    assert counts[-1] <= 4000
    over = [item for item in rejections if item.kind == "over budget"]
    assert over
    assert f"{len(over)} over budget" in text
    assert over[0].reason in text
    num_vision = sum(proposal.values["components"] == "vision" for proposal in proposals)
    assert num_vision
    assert f"kept for {len(counts) - num_vision} of {len(counts)} trials; {num_vision} not: the adapter changes" in text
    assert "2 trials on this machine (2 CPUs)" in text
    assert "--data-dir DIR" in text
    assert "Traceback" not in text


def test_an_adapted_neck_keeps_the_trunk_and_an_adapted_trunk_nothing(make_space):
    targets = "lora.target_modules: {choice: {neck: [proj1, box_head], trunk: [proj1, q_proj]}}"
    text = explained(make_space(targets, "lora.apply_to_vision_encoder=true", search="{algorithm: grid}"))
    # The base, which adapts the trunk, and both choices.
    assert "kept for 1 of 3 trials; 2 not: the adapter changes the vision trunk\n" in text


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["training.feature_cache=false"], "feature_cache is false"),
        (["data.augmentation=sam3"], "augmented"),
        (["training.model_dropout=true"], None),  # the small trunk has no dropout
        ([], None),
    ],
)
def test_why_features_are_not_kept(make_space, overrides, reason):
    why = why_not_kept(make_space(RANKS, *overrides).base)
    assert reason in why if reason else why is None


def test_size_of_features(make_space):
    # 8 x 8 patches of 32 values; of SAM 3, 72 x 72 of 1024.
    bf16, neck = "training.mixed_precision=bf16", "lora.target_modules=[proj1, box_head]"
    plain, small = make_space(RANKS).base, make_space(RANKS, "model.resolution=56").base
    half = make_space(RANKS, bf16).base
    whole = make_space(RANKS, bf16, neck, "lora.apply_to_vision_encoder=true").base
    assert feature_bytes([plain]) == feature_bytes([plain, plain]) == 64 * 32 * 4
    assert feature_bytes([small]) == 16 * 32 * 4
    assert feature_bytes([half]) == 64 * 32 * 2
    assert feature_bytes([whole]) == 64 * 32 * 4
    assert feature_bytes([half, whole, half]) == 64 * 32 * 6
    assert feature_bytes([load_config("light")]) == 72 * 72 * 1024 * 2


@pytest.mark.parametrize(("cache_gb", "is_told"), [(40e-6, True), (60e-6, False)])
def test_features_that_do_not_fit(make_space, data_dir, tmp_path, monkeypatch, cache_gb, is_told):
    # 6 images of 8192 bytes each.
    monkeypatch.setattr(probe_module, "run_probe", lambda config: pytest.fail("probed"))
    data = shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(data_dir / "valid", data / "other")
    overrides = [f"training.data_dir='{data}'", f"training.cache_gb={cache_gb}"]
    text = explained(make_space(RANKS, *overrides, search="{held_out_split: other}"), probe=False)
    told = f"those of 6 images take 0 MB (0.00819 MB each), more than training.cache_gb = {cache_gb:g}: every epoch"
    assert (told in text) == is_told
    assert "leave out --no-probe" in text
    assert "measured on other/ at the end" in " ".join(text.split())


def test_long_search_with_labels(make_space, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    monkeypatch.setattr(ray, "init", lambda *args, **options: pytest.fail("Ray was started"))
    labels = "lora.target_modules: {choice: {few: [v_proj], many: [q_proj, v_proj, fc1]}}"
    rates = "training.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}"
    text = explained(make_space(f"{labels}\n{rates}", search="{num_trials: 30}"))
    assert "... and 18 more" in text
    assert "1e-5 to 0.001, logarithmic" in text
    assert "  many = q_proj, v_proj, fc1" in text
    assert "depend on results" not in text
    assert re.search(r"Trainable   [\d,]+ parameters\n", explained(make_space(rates)))  # one number if all are alike


def test_missing_validation_split(make_space, data_dir, tmp_path):
    shutil.copytree(data_dir / "train", tmp_path / "data" / "train")
    with pytest.raises(UserError, match=r"no valid split.*val/"):
        explained(make_space(RANKS, f"training.data_dir='{tmp_path / 'data'}'"))


def test_measured(make_space, data_dir, tmp_path, monkeypatch):
    # The whole way, with real steps.
    monkeypatch.setattr(probe_module, "_import_seconds", lambda: 5.0)
    text = explained(make_space(RANKS, f"training.data_dir='{data_dir}'"))
    assert "Measured on the CPU with 1 thread; a trial takes 4 training and 2 validation images:" in text
    rows = rows_under(text, "start ")
    assert [row[0] for row in rows] == ["base configuration", f"largest (trial {largest_of(text)})"]
    assert all(row[-1] == "from the cache" for row in rows)
    assert "The sweep   at most" in text
    assert not (tmp_path / "never").exists()


def test_estimate(make_space, data_dir, monkeypatch):
    monkeypatch.setattr(probe_module, "run_probe", lambda config: PROBE)
    space = make_space(
        RANKS,
        f"training.data_dir='{data_dir}'",
        search="{num_trials: 4, metric: map, max_concurrent: 2}",
        early_stopping="{grace_epochs: 1, reduction_factor: 3}",
    )
    text = explained(space)
    # 9 epochs of 100 images at 0.5 s and 20 at 0.25 s, and mAP on the same 20: 10 + 9 x 60 s a trial; base and 3 ranks
    # are 3 different trials, 2 at a time.
    assert "A trial     9.2 min" in text
    assert "The sweep   at most 18 min, 2 at a time; about" in text
    share = expected_share(3, 9, (1, 3), 3)
    assert f"({share:.0%} of the epochs)" in text
    assert "2,048 MB" in text
    assert "the GPU (of a test)" in text
    assert "120 MB of cached images and features" in text


def test_probe_that_fails_is_told(make_space, data_dir, monkeypatch):
    def fail(config):
        if config.lora.rank == 8:
            raise OutOfMemory("out of memory with training.batch_size=2: set it to 1")
        return PROBE

    monkeypatch.setattr(probe_module, "run_probe", fail)
    text = explained(make_space(RANKS, f"training.data_dir='{data_dir}'"))
    failed = f"the probe of the largest (trial {largest_of(text)}) failed"
    assert f"{failed}: out of memory with training.batch_size=2: set it to 1" in text
