"""Chunks and workers: sums over parts equal the whole."""

import pytest
import torch

from sam3lora.losses import Criterion, Normalizer, Targets


def part_of(targets: Targets, queries: slice) -> Targets:
    num_B, ends = targets.num_B, targets.num_B.cumsum(0)
    chosen = range(*queries.indices(len(num_B)))
    rows = torch.cat([torch.arange(int(ends[b] - num_B[b]), int(ends[b])) for b in chosen])
    boxes, masks = targets.boxes_cxcywh_T4[rows], targets.masks_THW[rows]
    exhaustive_B = None if targets.exhaustive_B is None else targets.exhaustive_B[queries]
    return Targets(num_B[queries], boxes, masks, targets.mask_valid_T[rows], exhaustive_B)


@pytest.fixture(params=[None, [False, True, False, True], [True, True, True, False]], ids=["all", "some", "most"])
def mixed(request, load_case):
    """The case, with queries that are exhaustive and others that are not."""
    case = load_case("mixed")
    case.targets.exhaustive_B = None if request.param is None else torch.tensor(request.param)
    return case


def count_semantic(targets: Targets) -> int:
    """Queries whose semantic target is not empty."""
    return len(targets.query_index()[targets.has_mask_pixels()].unique())


def gradients(case) -> dict[str, torch.Tensor]:
    grads = {name: leaf.grad.clone() for name, leaf in case.leaves.items()}
    for leaf in case.leaves.values():
        leaf.grad = None
    return grads


def assert_same_gradients(actual, expected):
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    "chunks", [[slice(0, 2), slice(2, 4)], [slice(0, 3), slice(3, 4)], [slice(b, b + 1) for b in range(4)]]
)
def test_chunks_add_up(chunks, mixed, make_predictions):
    # Totals, terms and gradients of chunks sum to those of the whole, also where a chunk has no target (query 1).
    case, criterion = mixed, Criterion()
    whole = criterion(make_predictions(case.leaves), case.targets)
    whole.total.backward()
    expected = gradients(case)
    normalizer = Normalizer.from_counts(4, int(case.targets.num_B.sum()), count_semantic(case.targets))
    outputs = [
        criterion(make_predictions(case.leaves, chunk), part_of(case.targets, chunk), normalizer) for chunk in chunks
    ]
    sum(output.total for output in outputs).backward()
    torch.testing.assert_close(sum(output.total for output in outputs), whole.total, rtol=1e-5, atol=0)
    for name, value in whole.terms.items():
        summed = sum(output.terms[name] for output in outputs)
        torch.testing.assert_close(summed, value, rtol=1e-5, atol=1e-7, msg=name)
    assert_same_gradients(gradients(case), expected)


def test_workers_average_to_one_worker(mixed, make_predictions):
    # Each of two workers has half of the queries; the mean of their gradients is that of one worker with all.
    case, criterion = mixed, Criterion()
    criterion(make_predictions(case.leaves), case.targets).total.backward()
    expected = gradients(case)
    normalizer = Normalizer.from_counts(4, int(case.targets.num_B.sum()), count_semantic(case.targets), world_size=2)
    totals = []
    for queries in [slice(0, 2), slice(2, 4)]:
        output = criterion(make_predictions(case.leaves, queries), part_of(case.targets, queries), normalizer)
        (output.total / 2).backward()
        totals.append(output.total.detach())
    assert_same_gradients(gradients(case), expected)
    whole = criterion(make_predictions(case.leaves), case.targets).total.detach()
    torch.testing.assert_close(torch.stack(totals).mean(), whole, rtol=1e-5, atol=0)


def test_workers_average_with_a_single_target(load_case, make_predictions):
    # The clamp "at least one box" acts on the step's total, not on a worker's share: one target on two workers counts
    # fully.
    case, criterion = load_case("single_positive"), Criterion()
    whole = criterion(make_predictions(case.leaves), case.targets)
    share = criterion(make_predictions(case.leaves), case.targets, Normalizer.from_counts(1, 1, 1, world_size=2))
    torch.testing.assert_close(share.total / 2, whole.total)


def test_counts_of_nothing():
    # No division by zero where a step has neither targets nor masks.
    normalizer = Normalizer.from_counts(0, 0, 0, world_size=4)
    assert normalizer.num_queries > 0
    assert normalizer.num_boxes > 0
    assert normalizer.num_semantic > 0
    assert normalizer.scale == 0
