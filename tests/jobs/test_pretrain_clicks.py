"""Training of the tiny base's click head: its first weights, its starts, and a few steps from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.pretrain.bank import build_bank
from jobs.pretrain.click_head import first_click_head, save_both_halves
from jobs.pretrain.click_scenes import ClickScenes
from jobs.pretrain.click_stage import ClickStage, train_clicks
from jobs.pretrain.snapshot import Snapshot
from sam3lora.model.base_folder import find_base
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.fingerprint import fingerprint
from sam3lora.model.loading import load_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


@pytest.fixture(scope="module")
def scenes(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return ClickScenes.open(build_bank(folder, 8, seed=1, workers=1), base, folder / "tokens.safetensors")


@pytest.fixture
def head(base, scenes):
    torch.manual_seed(0)
    return first_click_head(base, scenes.tokens_ISC)


def test_an_image_and_a_mask_are_equally_loud_at_first(head, scenes):
    with torch.no_grad():
        coarse = head.embed(scenes.tokens_ISC.float()).coarse
        mask = head.prompt_encoder.mask_embed(8 * torch.randn(8, 1, 64, 64).sign())
    assert coarse.std() == pytest.approx(1, abs=0.2)
    assert 0.3 < mask.std() < 3


def test_both_halves_are_one_checkpoint(head, base, tmp_path):
    save_both_halves(find_base("tiny"), head, tmp_path / "tiny")
    again = load_base(str(tmp_path / "tiny"))
    assert again.fingerprint == base.fingerprint
    assert fingerprint(load_click_head(again)) == fingerprint(head.half().float())


def test_a_run_that_was_cut_goes_on(base, scenes, head, tmp_path):
    torch.manual_seed(0)
    stage = ClickStage(steps=3, mask_steps=1, last_steps=0, images=2)
    logged: list[str] = []
    snapshot = Snapshot(tmp_path / "snapshot.safetensors", {"head": head})
    train_clicks(head, [(scenes, 1.0)], stage, log=logged.append, snapshot=snapshot, check=lambda: "checked")
    assert logged == ["checked"]
    learned = fingerprint(head)
    other = first_click_head(base, scenes.tokens_ISC)
    train_clicks(other, [(scenes, 1.0)], stage, snapshot=Snapshot(tmp_path / "snapshot.safetensors", {"head": other}))
    assert fingerprint(other) == learned


def test_the_job_runs_from_end_to_end(tmp_path):
    script = Path(__file__).parents[2] / "jobs" / "pretrain_clicks.py"
    command = [sys.executable, str(script), "--output-dir", str(tmp_path), "--smoke"]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "clicks.json").read_text())["report"]
    assert report["objects"] > 0
    assert report["ceiling"] > 0.9
    assert load_click_head(load_base(str(tmp_path / "tiny"))).mask_side == 64
