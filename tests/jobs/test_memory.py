"""Memory that is counted without a GPU: living tensors by hand, and what is chosen for a card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jobs.bench import memory
from jobs.bench.memory import _drawn_matches, as_on_a_gpu, card_rows, chosen_on, peak_bytes
from jobs.bench.pretend_gpu import DEVICE, pretend_gpu
from jobs.bench.tensor_memory import TensorMemory
from sam3lora.losses.matching import CostTables, HungarianCost, OneToManyRule, begin_match
from sam3lora.losses.targets import Predictions, Targets

GB = 1e9
TABLES = CostTables(HungarianCost(), OneToManyRule())


def test_tensors_without_values_are_counted_as_long_as_they_live():
    with TensorMemory(torch.device("meta")) as found, pretend_gpu(with_values=False):
        weight = nn.Parameter(torch.zeros(100, 100, device=DEVICE))  # 40,000 bytes
        values = torch.rand(50, 100).to(DEVICE)  # 20,000 bytes; on the host nothing counts
        assert found.live_bytes == 60_000
        output = (values @ weight).relu()  # the product is freed, the output is kept for the backward pass
        assert (found.live_bytes, found.peak_bytes) == (80_000, 100_000)
        output.sum().backward()
        assert weight.grad is not None
        assert weight.grad.shape == (100, 100)
        del output
        assert found.live_bytes == 100_000
        assert values.sum().tolist() == 0  # what the host reads of a tensor without values
        weight.data = weight.data.bfloat16()
        assert found.live_bytes == 80_000


def test_attention_keeps_no_matrix_of_weights():
    def kept_bytes(length):
        with TensorMemory(torch.device("meta")) as found, pretend_gpu(with_values=False), as_on_a_gpu(_drawn_matches):
            query = torch.rand(1, 2, length, 8, device=DEVICE, requires_grad=True)
            key, value = (torch.rand(1, 2, 1000, 8, device=DEVICE) for _ in range(2))
            with torch.autocast("cuda", dtype=torch.bfloat16):
                before = found.live_bytes
                output = F.scaled_dot_product_attention(query, key, value)
            assert output.dtype == torch.bfloat16
            return found.live_bytes - before

    # For each query of each head its copy and the output, 8 values of 2 bytes, and a float32.
    assert kept_bytes(200) - kept_bytes(100) == 100 * 2 * (2 * 8 * 2 + 4)


def test_matches_are_drawn_for_every_target():
    # Two queries with two targets each, three layers, both branches.
    shape = (3, 2, 200)
    predictions = Predictions(torch.zeros(shape), torch.rand(*shape, 4), torch.zeros(3, 2))
    predictions.logits_o2m_LBQ, predictions.boxes_o2m_LBQ4 = torch.zeros(shape), torch.rand(*shape, 4)
    boxes = torch.rand(4, 4)
    masks = torch.zeros(4, 1, 1, dtype=torch.bool)  # which the drawn matches say to be valid and not empty
    targets = Targets(torch.tensor([2, 2]), boxes, masks, torch.ones(4, dtype=torch.bool))
    found = _drawn_matches(begin_match(predictions, targets, TABLES), copies=4)
    assert found.has_mask_pixels_T.all()
    assert found.num_targets_B.tolist() == [2, 2]
    o2o = found.o2o.host_M4
    assert found.o2o.num_per_layer == [4, 4, 4]
    assert o2o[:4].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 2], [0, 1, 1, 3]]
    assert found.o2m is not None
    assert found.o2m.num_per_layer == [4, 4, 16]
    last = found.o2m.host_M4[8:]
    assert len(np.unique(last[:, [1, 2]], axis=0)) == 16  # each has an object query of its own
    few = _drawn_matches(begin_match(predictions, targets, TABLES), copies=0)
    assert few.o2m.num_per_layer == [4, 4, 0]  # type: ignore[union-attr]


@pytest.fixture
def simple_memory(monkeypatch):
    """1 GB in use, 2 GB an image, 1 GB a prompt at a time; nothing of it beside the tensors."""

    def peak(preset, images, max_prompts, *, model):
        return (1 + 2 * images + min(max_prompts, 4 * images)) * 2**30

    monkeypatch.setattr(memory, "peak_bytes", peak)
    monkeypatch.setattr(memory, "RESERVED", 1.0)
    monkeypatch.setattr(memory, "GPU_SHARE", 1.0)
    monkeypatch.setattr(memory, "TAKEN_GB", 0.0)


def test_what_is_chosen_for_a_card(simple_memory):
    assert [chosen_on(gb, "light") for gb in (3, 4, 5.9, 6, 7, 9, 12, 13, 99)] == [
        *((0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (2, 4), (2, 8), (2, 8))
    ]
    rows = card_rows(["light"])
    assert [(row["card GB"], row["images"], row["prompts"]) for row in rows] == [
        *((8, 2, 2), (12, 2, 4), (16, 2, 8), (24, 2, 8))
    ]
    assert rows[0]["peak GB"] == pytest.approx(7 * 2**30 / 1e9)


@pytest.mark.slow
def test_a_step_takes_more_with_more_prompts_at_a_time():
    one, two = (peak_bytes("light", 1, prompts, model="tiny") for prompts in (1, 2))
    assert one < two < 2 * one  # the weights, at least, stay as they are
