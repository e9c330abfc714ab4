"""Which images are shown: right, wrong and missed by hand, and the order that follows."""

from __future__ import annotations

import numpy as np

from sam3lora.evaluation.metrics.cgf1_units import count_units
from sam3lora.evaluation.metrics.ranking import (
    MatchCounts,
    PairCounts,
    best_images,
    false_alarms,
    most_different_images,
    worst_images,
)

from .units import false_alarm, made_units, unit

CRACK, HOLE = 0, 1


def table(counts: dict[tuple[int, int], MatchCounts], num_images: int) -> PairCounts:
    """(image, category) -> counts; zeros elsewhere."""
    found = np.zeros((3, num_images, 2), int)
    for (image, category), entry in counts.items():
        found[:, image, category] = entry.num_right, entry.num_wrong, entry.num_missed
    return PairCounts(*found)


def test_nothing_to_find_and_nothing_found_is_right():
    assert MatchCounts().quality == 1
    assert worst_images([], 3) == best_images([], 3) == []


def test_counts_by_hand():
    # a good one, one that overlaps too little, one on the threshold, one below it; three objects
    found = unit([[0.8, 0, 0], [0, 0.49, 0], [0, 0, 0.5], [0, 0.9, 0]], [0.9, 0.8, 0.3, 0.29])
    units = made_units({(0, CRACK): found, (0, HOLE): false_alarm(0.4, 0.3, 0.29)}, (1, 2))
    counts = PairCounts.of(count_units(units, np.array([0.3, 0.35])))
    assert counts.pair(0, CRACK) == MatchCounts(num_right=2, num_wrong=1, num_missed=1)
    assert counts.pair(0, CRACK).quality == 4 / 6
    # each category has its own threshold
    assert counts.pair(0, HOLE) == MatchCounts(num_wrong=1)
    assert counts.total() == MatchCounts(2, 2, 1)


def test_an_image_is_the_sum_of_its_categories():
    counts = {(0, CRACK): MatchCounts(1, 2, 3), (0, HOLE): MatchCounts(10, 20, 30), (1, HOLE): MatchCounts(1, 0, 0)}
    assert table(counts, 2).images() == [MatchCounts(11, 22, 33), MatchCounts(1, 0, 0)]


def test_worst_come_first_and_ties_stay_in_order():
    totals = [
        MatchCounts(),  # nothing there, nothing found: no picture of it in either list
        MatchCounts(0, 0, 1),
        MatchCounts(1, 1, 0),
        MatchCounts(0, 2, 2),  # as bad as 1 and 5, with more errors
        MatchCounts(3, 0, 0),
        MatchCounts(0, 1, 0),
        MatchCounts(1, 0, 0),  # as good as 4, with fewer objects
    ]
    assert worst_images(totals, 9) == [3, 1, 5, 2]
    assert worst_images(totals, 2) == [3, 1]
    assert best_images(totals, 9) == [4, 6, 2]


def test_false_alarms_are_the_best_scores_of_absent_categories():
    best_score_IC = np.array([[0.9, 0.6], [0.9, 0.7], [-np.inf, 0.6]])
    is_alarm_IC = np.array([[False, True], [False, True], [False, True]])
    # of equal scores the earlier image
    assert false_alarms(best_score_IC, is_alarm_IC) == [(1, HOLE), (0, HOLE), (2, HOLE)]


def test_most_different_images_show_differences_and_false_alarms_in_turn():
    base = {
        (0, CRACK): MatchCounts(1, 0, 0),
        (1, CRACK): MatchCounts(0, 0, 1),
        (2, CRACK): MatchCounts(0, 0, 4),
        (3, CRACK): MatchCounts(0, 1, 0),
        (4, CRACK): MatchCounts(),
        (0, HOLE): MatchCounts(0, 0, 9),
    }
    adapter = base | {(1, CRACK): MatchCounts(1, 0, 0), (2, CRACK): MatchCounts(4, 0, 0), (3, CRACK): MatchCounts()}
    # of equal differences the image with more objects first; 0 is the same for both; 4 has nothing to show
    models = [table(base, 5), table(adapter, 5)]
    assert most_different_images(CRACK, models, 9) == [2, 3, 1, 0]
    assert most_different_images(CRACK, models, 1) == [2]
    assert most_different_images(HOLE, [table({}, 5)] * 2, 9) == []
