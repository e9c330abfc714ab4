"""Which images are shown: right, wrong and missed by hand, and the order that follows."""

from __future__ import annotations

import numpy as np

from sam3lora.evaluation.metrics.cgf1 import Unit
from sam3lora.evaluation.metrics.ranking import (
    MatchCounts,
    best_images,
    count_matches,
    false_alarms,
    most_different_images,
    sum_categories,
    worst_images,
)

CRACK, HOLE = 1, 2
AT_03 = {CRACK: 0.3, HOLE: 0.3}


def unit(ious: list[list[float]], scores: list[float], num_targets: int) -> Unit:
    return Unit(np.array(ious, float).reshape(len(scores), num_targets), np.array(scores))


def test_nothing_to_find_and_nothing_found_is_right():
    assert MatchCounts().quality == 1
    assert count_matches({(0, CRACK): unit([], [], 0)}, AT_03) == {(0, CRACK): MatchCounts()}
    assert worst_images({}, 3) == best_images({}, 3) == []


def test_counts_by_hand():
    # a good one, one that overlaps too little, one on the threshold, one below it; three objects
    found = unit([[0.8, 0, 0], [0, 0.49, 0], [0, 0, 0.5], [0, 0.9, 0]], [0.9, 0.8, 0.3, 0.29], 3)
    counts = count_matches({(0, CRACK): found}, AT_03)[0, CRACK]
    assert counts == MatchCounts(num_right=2, num_wrong=1, num_missed=1)
    assert counts.quality == 4 / 6


def test_an_image_is_the_sum_of_its_categories():
    counts = {(5, CRACK): MatchCounts(1, 2, 3), (5, HOLE): MatchCounts(10, 20, 30), (6, HOLE): MatchCounts(1, 0, 0)}
    assert sum_categories(counts) == {5: MatchCounts(11, 22, 33), 6: MatchCounts(1, 0, 0)}


def test_worst_come_first_and_ties_stay_in_order():
    totals = {
        1: MatchCounts(),  # nothing there, nothing found: no picture of it in either list
        2: MatchCounts(0, 0, 1),
        3: MatchCounts(1, 1, 0),
        4: MatchCounts(0, 2, 2),  # as bad as 2 and 6, with more errors
        5: MatchCounts(3, 0, 0),
        6: MatchCounts(0, 1, 0),
        7: MatchCounts(1, 0, 0),  # as good as 5, with fewer objects
    }
    assert worst_images(totals, 9) == [4, 2, 6, 3]
    assert worst_images(totals, 2) == [4, 2]
    assert best_images(totals, 9) == [5, 7, 3]


def test_false_alarms_are_the_best_scores_of_absent_categories():
    truth = {
        "annotations": [
            {"image_id": 0, "category_id": CRACK, "iscrowd": 0},
            {"image_id": 1, "category_id": CRACK, "iscrowd": 1},  # a crowd region: not absent
        ]
    }
    scores = {(0, CRACK): [0.9], (1, CRACK): [0.9], (0, HOLE): [0.4, 0.6], (1, HOLE): [0.7], (2, HOLE): [0.29]}
    predictions = [{"image_id": i, "category_id": c, "score": s} for (i, c), of in scores.items() for s in of]
    assert list(false_alarms(truth, predictions, AT_03).items()) == [((1, HOLE), 0.7), ((0, HOLE), 0.6)]


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
    assert most_different_images(CRACK, [base, adapter], 9) == [2, 3, 1, 0]
    assert most_different_images(CRACK, [base, adapter], 1) == [2]
    assert most_different_images(7, [base, adapter], 9) == []
