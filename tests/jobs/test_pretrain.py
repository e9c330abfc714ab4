"""Training of the tiny base model: its labels, its questions, its measures, and a few steps from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.pretrain import measure as measuring
from jobs.pretrain.bank import COLOURS, NOUNS, build_bank
from jobs.pretrain.joint_stage import scene_targets
from jobs.pretrain.measure import PromptDetections, measure
from jobs.pretrain.prompting import ScenePrompt, ask
from jobs.pretrain.snapshot import Snapshot
from jobs.pretrain.vision_stage import NONE, dense_targets
from jobs.pretrain.words import HELD_OUT_ABSENT, KNOWN_ABSENT
from sam3lora.data.synth.scenes import ALL_CONCEPTS, WORDS, draw_scene
from sam3lora.model.loading import load_base

pytestmark = pytest.mark.slow

CONCEPTS = {concept.prompt: concept for concept in ALL_CONCEPTS}


@pytest.fixture
def one_square():
    """A red square over patches (1..2, 1..2): pixels 14 to 42 in both directions."""
    labels = np.zeros((1, 224, 224), np.uint8)
    labels[0, 14:42, 14:42] = 1
    attributes = np.full((1, 9, 3), -1, np.int8)
    attributes[0, 0] = (NOUNS.index("square"), COLOURS.index("red"), -1)
    return labels, attributes


def test_patches_take_the_object_that_covers_them(one_square):
    targets = dense_targets(*one_square)
    noun, inside = targets.noun.view(16, 16), torch.zeros(16, 16, dtype=torch.bool)
    inside[1:3, 1:3] = True
    assert (noun[inside] == NOUNS.index("square")).all()
    assert (noun[~inside] == len(NOUNS)).all()
    assert (targets.colour.view(16, 16)[~inside] == NONE).all()
    assert torch.equal(targets.covered.view(16, 16), inside)
    assert torch.allclose(targets.boxes_cxcywh.view(16, 16, 4)[1, 1], torch.tensor([28, 28, 28, 28]) / 224)


def test_targets_of_a_present_and_an_absent_prompt(one_square):
    questions = [[ScenePrompt("square", "shape", [0], [(0, 1)]), ScenePrompt("star", "shape", [])]]
    targets, share, boxes, box_labels = scene_targets(one_square[0], questions)
    assert targets.num_B.tolist() == [1, 0]
    assert torch.allclose(targets.boxes_cxcywh_T4[0], torch.tensor([28.0, 28, 28, 28]) / 224)
    assert targets.masks_THW[0].float().mean() == pytest.approx((28 / 224) ** 2, rel=0.05)
    assert share.sum(1).tolist() == [4.0, 0.0]
    assert box_labels.flatten().tolist() == [1, -10]
    assert boxes[1].eq(-10).all()


def test_questions_are_true():
    # Positives find every object they name, negatives none, and no colour can be argued about.
    assert not set(HELD_OUT_ABSENT) & set(KNOWN_ABSENT)
    assert not {*HELD_OUT_ABSENT, *KNOWN_ABSENT} & set(WORDS)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        objects = draw_scene(rng).objects
        questions = ask(objects, rng, positives=3, negatives=3, exemplars=bool(seed % 2))
        assert [bool(question.wanted) for question in questions] == [True] * 3 + [False] * 3
        for question in questions:
            assert all(number in question.wanted and label == 1 for number, label in question.exemplars)
            if concept := CONCEPTS.get(question.prompt):
                named = [number for number, thing in enumerate(objects) if concept.matches(thing)]
                assert question.wanted == named
                assert not concept.is_ambiguous_in(objects)


@pytest.mark.parametrize("listens", [True, False])
def test_measures_tell_whether_a_model_listens_to_the_prompt(listens, tmp_path, monkeypatch):
    # Both see every object perfectly; one scores all objects alike for any prompt.
    bank = build_bank(tmp_path / "bank", 12, seed=7, workers=1)
    by_image = {np.asarray(bank.images[row]).tobytes(): bank.objects(row) for row in range(len(bank))}

    def answer(staged, tokenize, image, prompts):
        objects = by_image[image.tobytes()]
        masks = np.stack([thing.mask_HW[1::2, 1::2] for thing in objects])
        answers = []
        for prompt in prompts:
            concept = CONCEPTS.get(prompt)
            named = np.array([bool(concept and concept.matches(thing)) for thing in objects])
            scores = np.where(named, 0.9, 0.1) if listens else np.full(len(objects), 0.8)
            answers.append(PromptDetections(scores, masks, 0.9 if named.any() or not listens else 0.1))
        return answers

    monkeypatch.setattr(measuring, "answer", answer)
    report = measure(None, None, bank, num_images=12)
    assert report.map_50 == pytest.approx(1.0) if listens else report.map_50 > 0.1
    assert report.unknown_absent == float(listens)
    assert all(above == below == float(listens) for _, above, below in report.pairs.values())


def test_snapshot_restores_weights_and_moments(tmp_path):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def train(layer, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()

    straight, first, second = make(), make(), make()
    file = tmp_path / "stage.safetensors"
    train(*straight, 4)
    train(*first, 2)
    Snapshot(file, {"layer": first[0]}).save(2, first[1])
    assert Snapshot(file, {"layer": second[0]}).load(second[1]) == 2
    train(*second, 2)
    assert torch.equal(second[0].weight, straight[0].weight)


def test_job_writes_a_base_that_loads(tmp_path):
    # Started from another folder, as nothing but a script.
    job = Path(__file__).parents[2] / "jobs" / "pretrain_tiny.py"
    command = [sys.executable, str(job), "--output-dir", "tiny_run", "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base = load_base(str(tmp_path / "tiny_run" / "tiny"))
    assert base.resolution == 224
    assert base.model.detr_decoder.clamp_presence_logit_max_val == 10.0  # lifted only while training
    saved = json.loads((tmp_path / "tiny_run" / "report.json").read_text())
    assert saved["settings"]["joint_steps"] == 3
