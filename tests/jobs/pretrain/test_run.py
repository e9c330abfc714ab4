"""The pre-training from end to end, a few steps of it."""

from __future__ import annotations

import json

import torch

from jobs.pretrain.run import PretrainSettings, pretrain
from jobs.pretrain.snapshot import Snapshot
from sam3lora.model.loading import load_base

FEW = PretrainSettings(
    dense_scenes=8, scenes=8, held_out_scenes=3, vision_steps=2, vision_batch=2, joint_steps=2, joint_images=2
)


def test_it_writes_a_base_that_loads(tmp_path):
    lines: list[str] = []
    report = pretrain(tmp_path, FEW, lines.append)
    base = load_base(str(tmp_path / "tiny"))
    assert base.resolution == 224
    assert base.model.detr_decoder.clamp_presence_logit_max_val == 10.0  # lifted while training only
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["report"]["num_prompts"] == report.num_prompts == 12
    assert saved["settings"]["joint_steps"] == 2


def test_a_snapshot_restores_weights_and_moments(tmp_path):
    # A stage that was cut goes on with the weights, the optimizer's moments and the step that it had.
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    straight, straight_optimizer = make()
    for _ in range(4):
        step(straight, straight_optimizer)
    first, first_optimizer = make()
    for _ in range(2):
        step(first, first_optimizer)
    Snapshot(tmp_path / "stage.safetensors", {"layer": first}).save(2, first_optimizer)
    second, second_optimizer = make()
    assert Snapshot(tmp_path / "stage.safetensors", {"layer": second}).load(second_optimizer) == 2
    for _ in range(2):
        step(second, second_optimizer)
    assert torch.equal(second.weight, straight.weight)
    assert Snapshot(tmp_path / "none.safetensors", {"layer": second}).load() == 0
