"""Edges of the criterion: precision, empty batches, few object queries, memory, errors."""

import pytest
import torch

from sam3lora.losses import Criterion, HungarianCost, LossSection, OneToManyRule, Predictions, Targets

from .conftest import indices_of


def small_predictions(num_queries=2, num_object_queries=3, num_layers=2, seed=0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_queries, num_object_queries)

    def random(*size):
        return torch.rand(*size, generator=generator)

    logits, boxes = random(*shape).requires_grad_(), (0.3 + 0.3 * random(*shape, 4)).requires_grad_()
    logits_o2m, boxes_o2m = random(*shape).requires_grad_(), (0.3 + 0.3 * random(*shape, 4)).requires_grad_()
    presence = random(num_layers, num_queries).requires_grad_()
    return Predictions(logits, boxes, presence, logits_o2m, boxes_o2m)


def small_targets(counts) -> Targets:
    generator = torch.Generator().manual_seed(1)
    boxes = 0.3 + 0.3 * torch.rand(sum(counts), 4, generator=generator)
    masks = torch.rand(sum(counts), 8, 8, generator=generator) > 0.5
    return Targets(torch.tensor(counts, dtype=torch.long), boxes, masks, torch.ones(sum(counts), dtype=torch.bool))


def test_empty_batch():
    # No query at all: a zero total that can still be differentiated.
    output = Criterion()(small_predictions(num_queries=0), small_targets([]))
    output.total.backward()
    assert output.total.item() == 0


@pytest.mark.parametrize("num_object_queries", [1, 3, 4])
def test_fewer_object_queries_than_targets(num_object_queries):
    # Five targets, fewer object queries than that or than top-k: every object query is used, and all terms are finite.
    predictions = small_predictions(num_object_queries=num_object_queries)
    output = Criterion()(predictions, small_targets([5, 1]))
    output.total.backward()
    assert output.total.isfinite()
    for indices in indices_of(output.matches.o2o):
        assert len(indices) == num_object_queries + 1
        assert len(set(map(tuple, indices[:, :2].tolist()))) == len(indices)
    assert predictions.logits_LBQ.grad.isfinite().all()


def test_bfloat16_is_computed_in_float32(load_case, make_predictions):
    # bf16 predictions give the same loss as the same values in fp32, under autocast too, and gradients come back.
    case = load_case("mixed")
    low = make_predictions(case.leaves, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Criterion()(low, case.targets)
    output.total.backward()
    rounded = {name: leaf.detach().to(torch.bfloat16).float() for name, leaf in case.leaves.items()}
    expected = Criterion()(make_predictions(rounded), case.targets)
    assert output.total.dtype == torch.float32
    torch.testing.assert_close(output.total, expected.total, rtol=1e-5, atol=0)
    assert all(leaf.grad.isfinite().all() for leaf in case.leaves.values())


def test_without_masks_both_mask_terms_are_zero(load_case, make_predictions):
    # Targets without masks: mask and semantic terms are 0, the others unchanged, and the callables stay in the graph.
    case = load_case("mixed")
    targets = Targets(case.targets.num_B, case.targets.boxes_cxcywh_T4, None, case.targets.mask_valid_T)
    output = Criterion()(make_predictions(case.leaves), targets)
    output.total.backward()
    torch.testing.assert_close(output.total.detach(), case.expected["exp_core_loss_det__pad200"], rtol=1e-5, atol=0)
    for name in ["loss_mask", "loss_dice", "loss_mask_o2m", "loss_dice_o2m", "loss_semantic_seg", "loss_semantic_dice"]:
        assert output.terms[name] == 0
    assert all(case.leaves[name].grad is not None for name in ["masks", "masks_o2m", "semantic_logits"])


@pytest.mark.parametrize("grad", [True, False])
def test_callables_are_asked_only_for_what_is_needed(grad, load_case):
    # Matched pairs with a valid mask and queries with mask pixels; for a batch without any, one entry, and only for
    # gradients.
    calls = []

    def mask_logits(branch, b, q):
        calls.append((branch, b.tolist(), q.tolist()))
        return torch.zeros(len(b), 8, 8, requires_grad=True)

    def semantic_logits(b):
        calls.append(("semantic", b.tolist()))
        return torch.zeros(len(b), 8, 8, requires_grad=True)

    targets = small_targets([2, 0, 1, 1])
    targets.mask_valid_T[0] = False
    targets.masks_THW[3] = False
    predictions = small_predictions(num_queries=4, num_object_queries=6)
    predictions.mask_logits, predictions.semantic_logits = mask_logits, semantic_logits
    with torch.set_grad_enabled(grad):
        output = Criterion(one_to_many=OneToManyRule(threshold=0.0))(predictions, targets)
        kept = [row for row in indices_of(output.matches.o2o)[-1].tolist() if row[2] != 0]
        assert calls[0] == ("o2o", [row[0] for row in kept], [row[1] for row in kept])
        kept = [row for row in indices_of(output.matches.o2m)[-1].tolist() if row[2] != 0]
        assert calls[1] == ("o2m", [row[0] for row in kept], [row[1] for row in kept])
        assert calls[2:] == [("semantic", [0, 2])]
        calls.clear()
        Criterion()(predictions, small_targets([0, 0, 0, 0]))
        assert calls == ([("o2o", [0], [0]), ("o2m", [0], [0]), ("semantic", [0])] if grad else [])
        calls.clear()
        Criterion(touch_unused=False)(predictions, small_targets([0, 0, 0, 0]))
        assert calls == []


def test_without_the_one_to_many_branch():
    # Evaluation and light training leave the branch out: its terms are absent and the total is the rest.
    predictions, targets = small_predictions(), small_targets([1, 1])
    both = Criterion(LossSection(o2m=0))(predictions, targets)
    predictions.logits_o2m_LBQ = predictions.boxes_o2m_LBQ4 = None
    output = Criterion()(predictions, targets)
    assert not any(name.endswith("_o2m") for name in output.terms)
    assert output.matches.o2m is None
    torch.testing.assert_close(output.total, both.total)


@pytest.mark.parametrize(("branch", "layer"), [("boxes_cxcywh_LBQ4", 1), ("boxes_o2m_LBQ4", 0), ("boxes_o2m_LBQ4", 1)])
def test_non_finite_cost_names_the_query(branch, layer):
    # A NaN box in query 1 stops the step and says where.
    predictions, targets = small_predictions(), small_targets([1, 1])
    boxes = getattr(predictions, branch).detach().clone()
    boxes[layer, 1, 2] = float("nan")
    setattr(predictions, branch, boxes)
    name = "one-to-one" if branch == "boxes_cxcywh_LBQ4" else "one-to-many"
    with pytest.raises(FloatingPointError, match=rf"query 1 \({name} branch, decoder layer {layer}, object query 2"):
        Criterion()(predictions, targets)


def test_shape_mistakes_are_named():
    # Counts, masks and branches that do not fit are refused with both numbers.
    targets = small_targets([1, 1])
    with pytest.raises(ValueError, match="3 queries, got 2"):
        Criterion()(small_predictions(num_queries=3), targets)
    with pytest.raises(ValueError, match="sums to 3, but there are 2"):
        Targets(torch.tensor([1, 2]), targets.boxes_cxcywh_T4, targets.masks_THW, targets.mask_valid_T)
    predictions = small_predictions()
    predictions.logits_o2m_LBQ = small_predictions(num_object_queries=4).logits_LBQ
    with pytest.raises(ValueError, match=r"same shape, got \(2, 2, 3\) and \(2, 2, 4\)"):
        Criterion()(predictions, targets)
    with pytest.raises(ValueError, match=r"masks_THW must be \(2, H, W\)"):
        Targets(targets.num_B, targets.boxes_cxcywh_T4, torch.zeros(1, 8, 8), targets.mask_valid_T)


def test_shared_prediction_takes_its_last_target():
    # Two overlapping targets share object query 0: one classification entry, two box pairs, the higher target's
    # quality.
    box = torch.tensor([0.5, 0.5, 0.4, 0.4])
    targets = Targets(
        torch.tensor([2]),
        torch.stack([box, box * torch.tensor([1, 1, 1, 0.8])]),
        None,
        torch.zeros(2, dtype=torch.bool),
    )
    far = torch.tensor([0.1, 0.1, 0.1, 0.1])
    boxes = torch.stack([box, far, far, far, far, far])[None, None]
    logits = torch.tensor([[[2.0, -2.0, -2.1, -2.2, -2.3, -2.4]]])
    output = Criterion(one_to_many=OneToManyRule(topk=1), pad_n_queries=None)(
        Predictions(logits, boxes, torch.zeros(1, 1), logits, boxes), targets
    )
    assert indices_of(output.matches.o2m)[0].tolist() == [[0, 0, 0], [0, 0, 1]]
    x, p = torch.tensor(2.0), torch.sigmoid(torch.tensor(2.0))
    quality = p**0.25 * 0.8**0.75
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, quality)
    negative = (logits[0, 0, 1:].sigmoid() ** 2 * torch.nn.functional.softplus(logits[0, 0, 1:])).sum()
    torch.testing.assert_close(output.terms["loss_ce_o2m"], (10 * bce + negative) / 6)


def test_matching_rules_by_hand():
    # The nearer box wins one-to-one; one-to-many takes exactly top-k of distinct scores.
    target = Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]), None, torch.zeros(1, dtype=torch.bool))
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.2], [0.55, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]])
    logits = torch.zeros(1, 4)
    assert HungarianCost()(logits[None], boxes[None, None], target).argmin() == 0
    assert OneToManyRule(topk=2)(logits, boxes[None], target).tolist() == [[1, 1, 0, 0]]
    assert OneToManyRule(topk=2, threshold=0.9)(logits, boxes[None], target).sum() == 0
    assert OneToManyRule(topk=2)(logits, boxes[None, [0] * 4], target).sum() == 0  # none of equal scores is best


def test_full_resolution_masks_keep_no_large_buffers():
    # Autograd holds the small logits, not the resized masks: far less than one float per pixel and pair.
    targets = small_targets([4])
    targets.masks_THW = torch.rand(4, 128, 128) > 0.5
    masks = torch.randn(1, 4, 8, 8, requires_grad=True)
    predictions = small_predictions(num_queries=1, num_object_queries=4)
    predictions.mask_logits = lambda branch, b, q: masks[b, q]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        output = Criterion(mask_chunk=2)(predictions, targets)
    output.total.backward()
    assert sum(kept) < 128 * 128
    assert masks.grad.abs().max() > 0
