"""Kernels are counted as a GPU would start them, and no more of them are started than before."""

from __future__ import annotations

import pytest
import torch

from jobs.bench.launches import count_inference, count_training_step
from jobs.bench.pretend_gpu import pretend_gpu

# Upper limits: lower them when a count falls.
FIRST, AGAIN, LIGHT_STEP = 1690, 840, 2960
LIGHT_STEP_WITH_GRAPHS, FULL_STEP_WITH_GRAPHS = 400, 415
FIRST_WITH_GRAPHS, AGAIN_WITH_GRAPHS = 45, 30  # of eight prompts


def test_kernels_copies_and_reads_are_counted():
    with pretend_gpu() as launches:
        x = torch.arange(6.0).view(2, 3).to("cuda")  # one copy
        weight = torch.ones(3, 4, device="cuda").requires_grad_(True)  # one kernel
        assert (x.device.type, launches.total) == ("cuda", 2)
        launches.clear()
        with launches.part("product"), torch.autocast("cuda", dtype=torch.bfloat16):
            y = x.view(3, 2).t() @ weight  # views start nothing; two casts and a product
        assert y.dtype == torch.bfloat16
        assert launches.by_part == {"product": 3}
        # The casts read float32 and write bfloat16, the product has 6 + 12 values in and 8 out.
        assert launches.bytes_by_part["product"] == (4 + 2) * (6 + 12) + 2 * (6 + 12 + 8)
        assert not launches.reads
        assert y.sum().item() == 60
        assert launches.reads.total() == 1
        launches.clear()
        with launches.as_one("graph"):
            x.mul_(2).add_(1)
        assert launches.total == 1
        assert x.tolist() == [[1, 3, 5], [7, 9, 11]]
        y.float().sum().backward()
        assert weight.grad is not None
        assert weight.grad.device.type == "cuda"
        assert weight.grad.cpu().tolist() == [[1.0] * 4, [5.0] * 4, [9.0] * 4]


def test_what_is_on_the_device_is_not_on_the_host():
    with pretend_gpu():
        x = torch.ones(2, device="cuda")
        with pytest.raises(AssertionError, match="array"):
            x.numpy()
        assert x.cpu().numpy().tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="outside"):
        x + 1


def test_an_inference_starts_no_more_kernels():
    first, again = count_inference(1, graphs=False)
    assert first.launches <= FIRST
    assert again.launches <= AGAIN
    assert again.by_part.get("vision", 0) == again.by_part.get("text", 0) == 0


def test_with_graphs_a_question_is_a_few_launches():
    first, again = count_inference(8, graphs=True)
    assert first.launches <= FIRST_WITH_GRAPHS
    assert again.launches <= AGAIN_WITH_GRAPHS
    assert again.reads == 5  # the answers, then overlaps and masks of two groups of prompts


def test_a_training_step_starts_no_more_kernels():
    step = count_training_step("light", max_prompts=4)
    assert step.launches <= LIGHT_STEP
    assert all(step.by_part[part] > 0 for part in ("vision", "detector", "masks", "loss", "backward", "AdamW"))


def test_a_training_step_in_graphs_starts_no_more_kernels():
    step = count_training_step("light", model="tiny", max_prompts=4, graphs=True)  # as below
    assert step.launches <= LIGHT_STEP_WITH_GRAPHS
    assert "vision" not in step.by_part  # one graph, counted where it is started from


@pytest.mark.slow
def test_recomputed_layers_are_in_graphs():
    step = count_training_step("full", model="tiny", graphs=True)  # the layers of a graph do not count
    assert step.launches <= FULL_STEP_WITH_GRAPHS
