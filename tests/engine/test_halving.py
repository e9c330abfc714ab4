"""Batches that fail are done in halves."""

from __future__ import annotations

from sam3lora.engine.halving import run_in_halves


def run(items: list[int], most: int, broken: frozenset[int] = frozenset()):
    """The results and all attempts, where at most so many items succeed together and some never do."""
    attempts, freed = [], []

    def attempt(batch: list[int]) -> list[int] | None:
        attempts.append(list(batch))
        return None if len(batch) > most or broken & set(batch) else [-item for item in batch]

    return run_in_halves(attempt, items, freed.append), attempts, freed


def test_nothing_is_nothing():
    assert run([], 1) == ([], [[]], [])


def test_a_batch_that_fits_is_done_at_once():
    assert run([1, 2, 3], 4) == ([-1, -2, -3], [[1, 2, 3]], [])


def test_one_that_does_not_is_halved_until_it_does_in_order():
    results, attempts, freed = run([1, 2, 3, 4, 5], 2)
    assert results == [-1, -2, -3, -4, -5]
    assert attempts == [[1, 2, 3, 4, 5], [1, 2], [3, 4, 5], [3], [4, 5]]
    assert freed == [5, 3]


def test_an_item_that_fails_alone_has_no_result_after_a_second_attempt():
    results, attempts, _ = run([1, 2, 3, 4], 4, broken=frozenset({3}))
    assert results == [-1, -2, None, -4]
    assert attempts.count([3]) == 2
