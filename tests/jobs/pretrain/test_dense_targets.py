"""Labels of patches, drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jobs.pretrain.bank import COLOURS, NOUNS, build_bank
from jobs.pretrain.joint_stage import scene_targets
from jobs.pretrain.prompting import Question
from jobs.pretrain.vision_stage import NONE, dense_targets


@pytest.fixture
def one_square():
    # A red square over patches (1..2, 1..2): pixels 14 to 42 in both directions.
    labels = np.zeros((1, 224, 224), np.uint8)
    labels[0, 14:42, 14:42] = 1
    attributes = np.full((1, 9, 3), -1, np.int8)
    attributes[0, 0] = (NOUNS.index("square"), COLOURS.index("red"), -1)
    return labels, attributes


def test_patches_take_the_object_that_covers_them(one_square):
    targets = dense_targets(*one_square)
    noun = targets.noun.view(16, 16)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[1:3, 1:3] = True
    assert (noun[inside] == NOUNS.index("square")).all()
    assert (noun[~inside] == len(NOUNS)).all()
    assert (targets.colour.view(16, 16)[~inside] == NONE).all()
    assert torch.equal(targets.covered.view(16, 16), inside)
    box = targets.boxes_cxcywh.view(16, 16, 4)[1, 1]
    assert torch.allclose(box, torch.tensor([28, 28, 28, 28]) / 224)
    assert targets.outline.view(16, 16, 49)[1, 1].eq(1).all()


def test_targets_of_questions(one_square):
    # One question that names the square, one that names nothing: packed targets hold one object.
    labels, _ = one_square
    questions = [[Question("square", "shape", [0], [(0, 1)]), Question("star", "shape", [])]]
    targets, share, boxes, box_labels = scene_targets(labels, questions)
    assert targets.num_B.tolist() == [1, 0]
    assert torch.allclose(targets.boxes_cxcywh_T4[0], torch.tensor([28.0, 28, 28, 28]) / 224)
    assert targets.masks_THW.shape == (1, 64, 64)
    assert targets.masks_THW[0].float().mean() == pytest.approx((28 / 224) ** 2, rel=0.05)
    assert share.sum(1).tolist() == [4.0, 0.0]
    assert box_labels.flatten().tolist() == [1, -10]
    assert boxes[1].eq(-10).all()


def test_a_bank_is_built_once_and_reads_back(tmp_path):
    bank = build_bank(tmp_path / "bank", 4, seed=1, workers=1)
    written = (tmp_path / "bank" / "images.npy").stat().st_mtime_ns
    again = build_bank(tmp_path / "bank", 4, seed=1, workers=1)
    assert (tmp_path / "bank" / "images.npy").stat().st_mtime_ns == written
    assert np.array_equal(bank.images, again.images)
    for row in range(4):
        for number, thing in enumerate(bank.objects(row)):
            assert np.array_equal(thing.mask_HW, np.asarray(bank.labels[row]) == number + 1)
    assert bank.fully_visible_rows().tolist() == [0, 1, 2, 3]
