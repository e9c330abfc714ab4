"""Confusion matrix and boundary IoU of label maps drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lora.evaluation.dense.boundary import BoundaryIou, boundary_width, near_contour
from sam3lora.evaluation.dense.confusion import ConfusionMatrix
from sam3lora.evaluation.metrics.bootstrap import bootstrap_difference, bootstrap_value

NAMES = ["background", "road", "tree"]
TRUTH = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 255, 1, 1]], dtype=np.uint8)
PREDICTION = np.array([[0, 1, 1, 1], [0, 1, 1, 1], [1, 2, 0, 1]], dtype=np.uint8)


def matrix_of(*pairs, names=NAMES, first_id=0) -> ConfusionMatrix:
    matrix = ConfusionMatrix(names)
    for number, (prediction, truth) in enumerate(pairs, first_id):
        matrix.add(np.array(prediction), np.array(truth), image_id=number)
    return matrix


def random_maps(count: int, num_classes: int = 3, size_hw=(13, 17)):
    rng = np.random.default_rng(0)
    for _ in range(count):
        truth = rng.integers(0, num_classes, size_hw, dtype=np.uint8)
        prediction = np.where(rng.random(size_hw) < 0.6, truth, rng.integers(0, num_classes, size_hw)).astype(np.uint8)
        truth[rng.random(size_hw) < 0.1] = 255
        yield prediction, truth


def test_no_image():
    values = matrix_of().values()
    assert (values.num_images, values.mean_iou, values.pixel_accuracy, values.frequency_weighted_iou) == (
        0,
        *[None] * 3,
    )
    assert all(entry.iou is None and entry.pixels == 0 for entry in values.per_class.values())
    assert len(values.notes) == 4
    assert BoundaryIou(NAMES).values().mean is None


def test_counted_by_hand():
    # Of the 11 pixels that count: background 4 (2 found), road 6 (5 found), tree 1 (none).
    matrix = matrix_of((PREDICTION, TRUTH))
    assert matrix.matrix_NN.tolist() == [[2, 2, 0], [1, 5, 0], [0, 1, 0]]
    values = matrix.values()
    background, road, tree = values.per_class.values()
    assert (background.iou, background.precision, background.recall, background.pixels) == (2 / 5, 2 / 3, 2 / 4, 4)
    assert (road.iou, road.precision, road.recall, road.pixels) == (5 / 9, 5 / 8, 5 / 6, 6)
    # found nowhere: an IoU of 0 counts, a precision does not exist
    assert (tree.iou, tree.precision, tree.recall, tree.pixels) == (0, None, 0, 1)
    assert values.mean_iou == pytest.approx((2 / 5 + 5 / 9) / 3)
    assert values.mean_iou_foreground == pytest.approx(5 / 9 / 2)
    assert values.pixel_accuracy == pytest.approx(7 / 11)
    assert values.frequency_weighted_iou == pytest.approx((4 * 2 / 5 + 6 * 5 / 9) / 11)
    assert [note.split(":")[0] for note in values.notes] == ["tree"]


def test_a_class_that_never_occurs_is_left_out_of_the_mean():
    values = matrix_of(([[0, 1]], [[0, 1]])).values()
    assert (values.mean_iou, values.mean_iou_foreground) == (1, 1)
    assert values.per_class["tree"].iou is None
    # predicted where it is not: it occurs, and lowers the mean
    wrong = matrix_of(([[0, 2]], [[0, 1]])).values()
    assert wrong.mean_iou == pytest.approx(1 / 3)
    assert (wrong.per_class["tree"].iou, wrong.per_class["tree"].recall) == (0, None)


def test_an_ignored_pixel_counts_for_nothing():
    changed = PREDICTION.copy()
    changed[2, 1] = 0
    assert (matrix_of((changed, TRUTH)).matrix_NN == matrix_of((PREDICTION, TRUTH)).matrix_NN).all()
    assert matrix_of((PREDICTION, np.full_like(TRUTH, 255))).values().mean_iou is None


@pytest.mark.parametrize("make", [ConfusionMatrix, BoundaryIou])
def test_two_workers_are_one(make):
    # Whichever worker measured which image, and in whatever order.
    maps = list(random_maps(6))
    whole, first, second = (make(NAMES) for _ in range(3))
    for number, pair in enumerate(maps):
        whole.add(*pair, image_id=number)
    for worker, numbers in ((first, (5, 1, 2)), (second, (4, 0, 3))):
        for number in numbers:
            worker.add(*maps[number], image_id=number)
    first.merge(second)
    assert first.values() == whole.values()
    assert (first.counts.per_image() == whole.counts.per_image()).all()
    with pytest.raises(ValueError, match="image 0"):
        first.merge(second)
    with pytest.raises(ValueError, match="image 3"):
        whole.add(*maps[3], image_id=3)
    with pytest.raises(ValueError, match="classes"):
        whole.merge(make(["background", "road"]))


@pytest.mark.parametrize("make", [ConfusionMatrix, BoundaryIou])
def test_labels_out_of_range(make):
    for prediction, truth in (([[3]], [[0]]), ([[0]], [[3]]), ([[255]], [[0]]), ([[0]], [[-1]]), ([[0, 0]], [[0]])):
        with pytest.raises(ValueError, match="expected"):
            make(NAMES).add(np.array(prediction), np.array(truth), image_id=0)
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="names"):
            make(names)


def test_the_bootstrap_measures_the_images_it_draws():
    # A weight of 2 is the image twice, a weight of 0 none of it.
    maps = list(random_maps(4))
    matrix, boundary = matrix_of(*maps), BoundaryIou(NAMES)
    for number, pair in enumerate(maps):
        boundary.add(*pair, image_id=number)
    repeated = matrix_of(maps[1], maps[1], maps[3], maps[0])
    weights = np.array([1, 2, 0, 1])
    for name in ("mean_iou", "mean_iou_foreground", "pixel_accuracy", "frequency_weighted_iou"):
        assert matrix.metric(name)(weights) == pytest.approx(getattr(repeated.values(), name))
        assert matrix.metric(name)(np.ones(4)) == pytest.approx(getattr(matrix.values(), name))
    assert matrix.metric("iou/tree")(weights) == pytest.approx(repeated.values().per_class["tree"].iou)
    assert boundary.mean_metric()(np.ones(4)) == pytest.approx(boundary.values().mean)
    found = bootstrap_value(matrix.metric("mean_iou"), 4, num_resamples=200)
    assert found.low < found.value == matrix.values().mean_iou < found.high
    better = matrix_of(*((truth % 255, truth) for _, truth in maps))
    gain = bootstrap_difference(matrix.metric("mean_iou"), better.metric("mean_iou"), 4, num_resamples=200)
    assert gain.difference == pytest.approx(1 - found.value)
    assert gain.excludes_zero


def test_boundary_of_a_square_by_hand():
    # 20 x 30 pixels have a boundary of round(0.02 * 36.06) = 1 pixel: the square's outer ring, the ring of background
    # around it, and the image's border.
    truth, moved = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    truth[5:11, 5:11] = moved[5:11, 6:12] = 1
    assert boundary_width(truth.shape) == 1
    ring = near_contour(truth, np.ones_like(truth, dtype=bool), 1) & (truth == 1)
    assert ring.sum() == 20
    assert not ring[6:10, 6:10].any()
    found = BoundaryIou(["background", "square"])
    found.add(moved, truth, image_id=0)
    # two rings of 20 pixels, one beside the other, share the upper and the lower row but for one pixel: 5 each
    assert found.values().per_class["square"] == pytest.approx(10 / 30)
    # background: the image's border of 96 and a ring of 28 that shares 2 x 7 pixels with the other
    assert found.values().per_class["background"] == pytest.approx((96 + 14) / (96 + 42))
    assert found.values().mean_foreground == pytest.approx(1 / 3)


def test_boundary_agrees_with_one_mask_at_a_time():
    # The definition, for each class: its pixels without those that erosion by d pixels leaves, zeros around the image.
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, (7, 9)).repeat(9, axis=0).repeat(8, axis=1).astype(np.uint8)
    near = near_contour(labels, np.ones(labels.shape, dtype=bool), 2)
    for label in range(3):
        padded = np.pad(labels == label, 2)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
        assert ((labels == label) & ~windows.all(axis=(2, 3)) == (near & (labels == label))).all()
    assert 0 < near.mean() < 1


def test_ignored_pixels_make_no_boundary():
    # An ignored strip between two classes: the contour is between them; the strip itself is no contour.
    truth = np.zeros((12, 30), np.uint8)
    truth[:, 14] = 255
    assert not near_contour(truth, truth != 255, 1)[1:-1, 1:-1].any()
    truth[:, 15:] = 1
    near = near_contour(truth, truth != 255, 2)[2:-2, 2:-2]
    assert near.any(axis=0).nonzero()[0].tolist() == [11, 13]
    # what is predicted on it changes nothing
    values = []
    for label in (0, 1):
        prediction = np.where(truth == 255, label, truth).astype(np.uint8)
        found = BoundaryIou(["background", "wall"])
        found.add(prediction, truth, image_id=0)
        values.append(found.values())
    assert values[0] == values[1]
    assert values[0].mean == 1


def test_all_wrong_and_a_single_pixel():
    for make in (ConfusionMatrix, BoundaryIou):
        for shape in ((1, 1), (6, 5)):
            found = make(["background", "thing"])
            found.add(np.ones(shape, np.uint8), np.zeros(shape, np.uint8), image_id=0)
            per_class = found.values().per_class
            assert [getattr(value, "iou", value) for value in per_class.values()] == [0, 0]
