"""Focal and dice loss with their gradient in one pass, against the formulas and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam3lora.losses.focal_dice import focal_and_dice, resize
from sam3lora.losses.masks import mask_loss_sums, semantic_loss_sums
from sam3lora.losses.terms import sigmoid_focal, soft_dice


def written_out(logits: Tensor, masks: Tensor, alpha: float, exhaustive: Tensor | None = None) -> Tensor:
    """Both sums from the element-wise formulas, with autograd."""
    large, labels = resize(logits, masks.shape[1:]).flatten(1), masks.flatten(1)
    known = torch.ones_like(labels) if exhaustive is None else labels | exhaustive[:, None]
    focal = (sigmoid_focal(large, labels, alpha, gamma=2.0) * known).mean(dim=1).sum()
    return torch.stack([focal, soft_dice(large.masked_fill(~known, -1e9), labels).sum()])


def blobs(num_masks: int, side: int = 24, small: int = 8, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Noise as logits; masks of several sizes, the last one empty and the first one full."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(num_masks, side, side, dtype=torch.bool)
    for number in range(num_masks - 1):
        masks[number, number : side - number, 2 * number :] = True
    return scale * torch.randn(num_masks, small, small, generator=generator), masks


@pytest.mark.parametrize("alpha", [0.25, 0.6])
@pytest.mark.parametrize("exhaustive", [None, [True, False, True, False]])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_values_and_gradients_are_those_of_the_formulas(alpha, exhaustive, weights):
    # Both terms, alone and weighted, with an empty and a full mask.
    logits, masks = blobs(4)
    exhaustive = None if exhaustive is None else torch.tensor(exhaustive)
    found = []
    for compute in (focal_and_dice, written_out):
        leaf = logits.clone().requires_grad_()
        sums = compute(leaf, masks, alpha, exhaustive)
        (sums * torch.tensor(weights)).sum().backward()
        found.append((sums.detach(), leaf.grad))
    (actual, d_actual), (expected, d_expected) = found
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_actual, d_expected, rtol=0, atol=1e-5 * d_expected.abs().max().item())


@pytest.mark.parametrize("sign", [-1, 1])
def test_certain_logits_stay_finite(sign):
    # Right and wrong by far: no overflow, and gradients of the formulas.
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0] = True
    leaves = [torch.full((2, 4, 4), 60.0 * sign).requires_grad_() for _ in range(2)]
    sums = [compute(leaf, masks, 0.25) for compute, leaf in zip((focal_and_dice, written_out), leaves, strict=True)]
    for one in sums:
        one.sum().backward()
    torch.testing.assert_close(*[one.detach() for one in sums])
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-8)


def test_gradients_in_float64():
    logits, masks = blobs(3, side=6, small=3, scale=1.0)
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal_and_dice(x, masks, 0.25), leaf)
    same_size = torch.randn(3, 6, 6, dtype=torch.float64, requires_grad=True)
    before = same_size.detach().clone()
    assert torch.autograd.gradcheck(lambda x: focal_and_dice(x, masks, 0.6), same_size)
    assert torch.equal(same_size, before)  # without resizing, nothing is computed in the caller's memory


def test_no_gradient_is_computed_where_none_is_asked_for():
    logits, masks = blobs(3)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        without = focal_and_dice(logits, masks, 0.25)
        with torch.no_grad():
            focal_and_dice(logits.clone().requires_grad_(), masks, 0.25)
        assert not without.requires_grad
        assert not kept
        assert focal_and_dice(logits.clone().requires_grad_(), masks, 0.25).requires_grad
    assert kept


def test_chunks_and_soft_labels():
    # Chunks add up; labels between 0 and 1 take the formulas' way; no pair at all is zero.
    logits, masks = blobs(5)
    index = torch.tensor([4, 0, 1, 1, 2])
    expected = mask_loss_sums(logits, masks, index)
    torch.testing.assert_close(mask_loss_sums(logits, masks, index, chunk_size=2), expected)
    torch.testing.assert_close(mask_loss_sums(logits, masks.float(), index), expected)
    torch.testing.assert_close(expected, written_out(logits, masks[index], 0.25))
    assert mask_loss_sums(logits[:0], masks, index[:0]).tolist() == [0, 0]
    assert semantic_loss_sums(logits[:0], lambda start, end: masks[start:end]).tolist() == [0, 0]
    bf16 = logits.bfloat16().requires_grad_()
    mask_loss_sums(bf16, masks, index).sum().backward()
    assert bf16.grad is not None
    assert bf16.grad.dtype == torch.bfloat16
