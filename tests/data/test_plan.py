"""Plans: equal shares, nothing forgotten, exact resumption."""

from __future__ import annotations

import pytest

from sam3lora.data.plan import plan_epoch, plan_run, plan_validation


@pytest.mark.parametrize(
    ("num_images", "batch_size", "world_size"), [(1, 1, 1), (1, 4, 3), (10, 2, 1), (10, 3, 2), (503, 8, 4), (12, 2, 3)]
)
def test_ranks_have_equal_batches_that_cover_every_image(num_images, batch_size, world_size):
    ranks = [plan_epoch(num_images, batch_size=batch_size, world_size=world_size, rank=r) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert set(rows) == set(range(num_images))
    # no more padding than the last round of batches needs
    assert len(rows) - num_images < batch_size * world_size
    assert max(rows.count(row) for row in set(rows)) == -(-len(rows) // num_images)


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"batch_size": 0}, {"rank": -1}, {"rank": 1}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(AssertionError):
        plan_epoch(**{"num_images": 4, "batch_size": 1} | wrong)


def test_order_depends_on_seed_and_epoch_only():
    first = plan_epoch(50, batch_size=5, seed=1, epoch=2)
    assert first == plan_epoch(50, batch_size=5, seed=1, epoch=2)
    assert first != plan_epoch(50, batch_size=5, seed=1, epoch=3)
    assert first != plan_epoch(50, batch_size=5, seed=2, epoch=2)
    assert plan_epoch(4, batch_size=2, shuffle=False) == [[0, 1], [2, 3]]


def test_the_same_images_make_a_step_whatever_the_number_of_ranks():
    # four images a step: one rank of four, two ranks of two
    one = plan_epoch(20, batch_size=4)
    two = [plan_epoch(20, batch_size=2, world_size=2, rank=r) for r in range(2)]
    assert one == [a + b for a, b in zip(*two, strict=True)]


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 2), (2, 4)])
def test_a_resumed_run_gets_what_was_left(epoch, step):
    settings = {"batch_size": 2, "num_epochs": 3, "seed": 7}
    whole = list(plan_run(9, **settings))
    rest = list(plan_run(9, **settings, start_epoch=epoch, start_step=step))
    assert len(whole) == 15
    assert rest == whole[epoch * 5 + step :]


def test_validation_takes_every_image_once_in_order():
    ranks = [list(plan_validation(10, batch_size=2, world_size=3, rank=r)) for r in range(3)]
    rows = sorted(row for batches in ranks for batch in batches for row in batch.rows)
    assert rows == list(range(10))
    assert [b.rows for b in plan_validation(5, batch_size=2)] == [[0, 1], [2, 3], [4]]
    assert list(plan_validation(1, batch_size=2, world_size=2, rank=1)) == []


def test_the_order_of_a_seed_stays():
    # Checkpoints hold positions in this order: another one would train some images twice and others never.
    assert plan_epoch(7, batch_size=2, world_size=2, rank=1, seed=3, epoch=1) == [[4, 0], [3, 2]]
    plan = plan_run(5, batch_size=2, num_epochs=2, seed=11, start_step=1)
    assert [tuple(batch) for batch in plan] == [
        (0, 1, [2, 3]),
        (0, 2, [0, 1]),
        (1, 0, [3, 0]),
        (1, 1, [4, 1]),
        (1, 2, [2, 3]),
    ]


def test_a_long_run_is_planned_as_it_goes():
    plan = plan_run(100_000, batch_size=1, num_epochs=10**9)
    first = [next(plan).rows for _ in range(3)]
    assert first == plan_epoch(100_000, batch_size=1)[:3]
