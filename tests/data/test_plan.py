"""Plans: equal shares, nothing forgotten, exact resumption."""

from __future__ import annotations

from itertools import chain

import pytest

from sam3lora.data.plan import plan_epoch, plan_run, plan_validation


@pytest.mark.parametrize(
    ("num_images", "images_per_step", "world_size"),
    [(1, 1, 1), (1, 4, 3), (10, 2, 1), (10, 6, 2), (503, 32, 4), (12, 6, 3), (20, 7, 4), (5, 2, 3)],
)
def test_ranks_share_steps_that_cover_every_image(num_images, images_per_step, world_size):
    plan = {"images_per_step": images_per_step, "seed": 3, "epoch": 1}
    ranks = [plan_epoch(num_images, **plan, world_size=world_size, rank=r) for r in range(world_size)]
    steps = [list(chain(*shares)) for shares in zip(*ranks, strict=True)]
    # the steps are those of one rank, in the same order
    assert steps == plan_epoch(num_images, **plan)
    assert {len(step) for step in steps} == {images_per_step}
    # a rank has equally large shares in all steps, and no rank has two more images than another
    sizes = [{len(share) for share in shares} for shares in ranks]
    assert all(len(size) == 1 for size in sizes)
    assert max(map(max, sizes)) - min(map(min, sizes)) <= 1
    rows = list(chain(*steps))
    assert set(rows) == set(range(num_images))
    # no more padding than the last step needs, with the first images
    assert len(rows) - num_images < images_per_step
    assert rows[num_images:] == (rows[:num_images] * images_per_step)[: len(rows) - num_images]


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"images_per_step": 0}, {"rank": -1}, {"rank": 1}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(AssertionError):
        plan_epoch(**{"num_images": 4, "images_per_step": 1} | wrong)


def test_order_depends_on_seed_and_epoch_only():
    first = plan_epoch(50, images_per_step=5, seed=1, epoch=2)
    assert first == plan_epoch(50, images_per_step=5, seed=1, epoch=2)
    assert first != plan_epoch(50, images_per_step=5, seed=1, epoch=3)
    assert first != plan_epoch(50, images_per_step=5, seed=2, epoch=2)
    assert plan_epoch(4, images_per_step=2, shuffle=False) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 2), (2, 4)])
def test_a_resumed_run_gets_what_was_left(epoch, step):
    settings = {"images_per_step": 2, "num_epochs": 3, "seed": 7}
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
    assert plan_epoch(7, images_per_step=4, world_size=2, rank=1, seed=3, epoch=1) == [[4, 0], [3, 2]]
    plan = plan_run(5, images_per_step=2, num_epochs=2, seed=11, start_step=1)
    assert [tuple(batch) for batch in plan] == [
        (0, 1, [2, 3]),
        (0, 2, [0, 1]),
        (1, 0, [3, 0]),
        (1, 1, [4, 1]),
        (1, 2, [2, 3]),
    ]


def test_a_long_run_is_planned_as_it_goes():
    plan = plan_run(100_000, images_per_step=1, num_epochs=10**9)
    first = [next(plan).rows for _ in range(3)]
    assert first == plan_epoch(100_000, images_per_step=1)[:3]
