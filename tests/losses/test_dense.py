"""The loss of dense prediction against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sam3lora.label_values import IGNORE
from sam3lora.losses.dense import (
    DenseCriterion,
    at_centres,
    boundary_weights,
    cross_entropy_and_dice,
    structure_terms,
)

MODES = ["binary", "multiclass", "multilabel"]


def example(mode: str, images: int = 3, side: int = 48, classes: int = 4, dtype=torch.float32):
    """Logits of three levels and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(5)
    channels = 1 if mode == "binary" else classes
    logits = [
        (2 * torch.randn(images, channels, side // s, side // s, generator=generator, dtype=dtype)).requires_grad_()
        for s in (1, 2, 4)
    ]
    shape = (images, channels, side // 4, side // 4) if mode == "multilabel" else (images, side // 4, side // 4)
    top = classes if mode == "multiclass" else 2
    labels = torch.randint(0, top, shape, generator=generator).repeat_interleave(4, -1).repeat_interleave(4, -2)
    labels[..., 2 : side // 4, 3 : side // 3] = IGNORE
    return logits, labels.to(torch.uint8)


def test_structure_loss_by_hand():
    # 2 x 2 pixels (a window of one, so all weigh 1), p = 3/4, 1/2, 1/4, 3/4 for labels 1, 1, 0, ignored.
    x = math.log(3)
    logits = torch.tensor([[[x, 0.0], [-x, x]]])
    bce, iou = structure_terms(logits, torch.tensor([[[1, 1], [0, IGNORE]]], dtype=torch.uint8))
    assert bce.item() == pytest.approx((math.log(4 / 3) + math.log(2) + math.log(4 / 3)) / 3)
    assert iou.item() == pytest.approx(1 - (0.75 + 0.5 + 1) / (1 + 1 + 0.25 + 1))


def test_weights_by_hand():
    # A map of side 33 has a window of three: 33 * 31 / 336 = 3.04. One pixel in the middle, one in a corner.
    target, valid = torch.zeros(1, 33, 33), torch.ones(1, 33, 33)
    target[0, 16, 16] = target[0, 0, 0] = 1
    weight = boundary_weights(target, valid, 5.0)[0]
    assert weight[16, 16].item() == pytest.approx(1 + 5 * (1 - 1 / 9))
    assert weight[15, 17].item() == pytest.approx(1 + 5 / 9)
    assert weight[14, 16] == 1
    # only pixels of the map count: four around a corner, six at an edge
    assert weight[0, 0].item() == pytest.approx(1 + 5 * (1 - 1 / 4))
    assert weight[0, 1].item() == pytest.approx(1 + 5 / 6)
    # nor do ignored ones: beside the pixel four of nine are left
    valid[0, :16] = 0
    valid[0, 17, :17] = 0
    target[0, 0, 0] = 0
    ignoring = boundary_weights(target, valid, 5.0)[0]
    assert ignoring[16, 16].item() == pytest.approx(1 + 5 * (1 - 1 / 4))
    assert ignoring[:16].abs().max() == 0


@pytest.mark.parametrize(("side", "window"), [(336, 31), (96, 9), (48, 5), (24, 3), (288, 27), (8, 1)])
def test_window_is_the_same_part_of_every_map(side, window):
    target = torch.zeros(1, side, side)
    middle = side // 2
    target[0, middle, middle] = 1
    row = boundary_weights(target, torch.ones_like(target), 1.0)[0, middle]
    assert (row > 1).sum() == (window if window > 1 else 0)


def test_the_weighting_acts_on_the_cross_entropy():
    # The original's call of the library averages before it weighs, so that its weights have no effect.
    logits, labels = example("binary")
    [plain, weighted] = (structure_terms(logits[0].flatten(0, 1), labels, weight)[0] for weight in (0.0, 5.0))
    valid = (labels != IGNORE).float()
    bce = F.binary_cross_entropy_with_logits(logits[0][:, 0], (labels == 1).float(), reduction="none")
    torch.testing.assert_close(plain, (bce * valid).sum((1, 2)) / valid.sum((1, 2)))
    window = boundary_weights((labels == 1).float(), valid, 5.0)
    torch.testing.assert_close(weighted, (bce * window).sum((1, 2)) / window.sum((1, 2)))
    large = torch.zeros(1, 64, 64, dtype=torch.uint8)
    large[:, 20:40, 20:40] = 1
    uncertain = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.isclose(*(structure_terms(uncertain, large, weight)[0] for weight in (0.0, 5.0)), rtol=1e-3)


def test_cross_entropy_and_dice_by_hand():
    # Two of three classes are shown; probabilities (1/2, 1/4, 1/4) everywhere, one pixel of four is ignored.
    logits = torch.tensor([0.5, 0.25, 0.25]).log()[None, :, None, None].expand(1, 3, 2, 2)
    labels = torch.tensor([[[0, 0], [1, IGNORE]]], dtype=torch.uint8)
    entropy, dice = cross_entropy_and_dice(logits, labels)
    assert entropy.item() == pytest.approx((2 * math.log(2) + math.log(4)) / 3)
    background, first = 1 - (2 * 1 + 1) / (1.5 + 2 + 1), 1 - (2 * 0.25 + 1) / (0.75 + 1 + 1)
    assert dice.item() == pytest.approx((background + first) / 2)


def test_weight_of_classes_is_that_of_the_foreground_as_a_whole():
    # Between two classes there is no boundary to the background: all pixels weigh the same.
    labels = torch.ones(1, 64, 64, dtype=torch.uint8)
    labels[:, :, 32:] = 2
    logits = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    unweighted, _ = cross_entropy_and_dice(logits, labels, 0.0)
    torch.testing.assert_close(cross_entropy_and_dice(logits, labels, 5.0)[0], unweighted)
    labels[:, :, 32:] = 0
    [plain, weighted] = (cross_entropy_and_dice(logits, labels, weight)[0] for weight in (0.0, 5.0))
    assert not torch.isclose(plain, weighted, rtol=1e-3)


def test_image_without_foreground():
    logits = torch.zeros(1, 4, 4)
    bce, iou = structure_terms(logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert bce.item() == pytest.approx(math.log(2))
    assert iou.item() == pytest.approx(1 - 1 / (16 / 2 + 1))
    entropy, dice = cross_entropy_and_dice(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert (entropy.item(), dice.item()) == (pytest.approx(math.log(2)), pytest.approx(1 - 17 / (8 + 16 + 1)))


@pytest.mark.parametrize("mode", MODES)
def test_perfect_logits_have_no_loss(mode):
    _, labels = example(mode)
    chosen = torch.where(labels == IGNORE, 0, labels).long()
    if mode == "multiclass":
        logits = 60.0 * F.one_hot(chosen, 4).permute(0, 3, 1, 2)
    else:
        logits = 60.0 * (2 * chosen - 1).view(3, -1, 48, 48)
    output = DenseCriterion(mode, level_weights=[1.0])([logits], labels, 3)
    assert output.total.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_ignored_pixels_change_nothing(mode):
    logits, labels = example(mode)
    criterion = DenseCriterion(mode, level_weights=[1.0])
    whole = criterion(logits[:1], labels, 3).total
    [gradient] = torch.autograd.grad(whole, logits[0])
    ignored = (labels == IGNORE).view(3, -1, 48, 48).expand_as(gradient)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()
    assert torch.equal(criterion([torch.where(ignored, 7.0, logits[0])], labels, 3).total, whole)
    # an image that is ignored as a whole has no loss, and its gradient is 0, not NaN
    lost = criterion(logits[:1], torch.full_like(labels, IGNORE), 3).total
    assert lost == 0
    assert (torch.autograd.grad(lost, logits[0])[0] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_step_add_up(mode):
    # One worker with all images, micro-batches, and the mean over workers, of whom one has no image.
    logits, labels = example(mode)
    criterion = DenseCriterion(mode)
    whole = criterion(logits, labels, 3)
    parts = [criterion([one[rows] for one in logits], labels[rows], 3) for rows in (slice(0, 1), slice(1, 3))]
    rows_of_workers = (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 3))
    workers = [criterion([one[rows] for one in logits], labels[rows], 3, 4) for rows in rows_of_workers]
    expected = torch.autograd.grad(whole.total, logits)
    for found in (sum(part.total for part in parts), sum(worker.total for worker in workers) / 4):
        torch.testing.assert_close(found, whole.total)
        for one, other in zip(torch.autograd.grad(found, logits, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(one, other)
    for name, value in whole.terms.items():
        torch.testing.assert_close(sum(part.terms[name] for part in parts), value)
    torch.testing.assert_close(sum(whole.terms.values()), whole.total.detach())


@pytest.mark.parametrize("mode", MODES)
def test_levels_are_weighted(mode):
    logits, labels = example(mode)
    alone = [
        DenseCriterion(mode, level_weights=[1.0])([one], at_centres(labels, one.shape[-2:]), 3).total for one in logits
    ]
    found = DenseCriterion(mode, level_weights=[1.0, 0.4, 0.2])(logits, labels, 3).total
    torch.testing.assert_close(found, alone[0] + 0.4 * alone[1] + 0.2 * alone[2])
    # at inference there is the finest level only
    torch.testing.assert_close(DenseCriterion(mode)(logits[:1], labels, 3).total, alone[0])


def test_coarse_labels_are_those_at_the_centres_of_pixels():
    labels = torch.arange(12.0 * 24).view(1, 1, 12, 24)
    for size in ((12, 24), (6, 12), (3, 6), (4, 8), (12, 4)):
        assert torch.equal(at_centres(labels, size), F.interpolate(labels, size, mode="nearest-exact"))


def test_labels_that_exclude_no_class():
    # The mean of every class alone.
    logits, labels = example("multilabel")
    found = DenseCriterion("multilabel")(logits, labels, 3).total
    alone = [DenseCriterion("binary")([one[:, k : k + 1] for one in logits], labels[:, k], 3).total for k in range(4)]
    torch.testing.assert_close(found, sum(alone) / 4)


@pytest.mark.parametrize("mode", MODES)
def test_float32_under_autocast(mode):
    logits, labels = example(mode)
    low = [one.detach().bfloat16().requires_grad_() for one in logits]
    plain = DenseCriterion(mode)([one.float() for one in low], labels, 3).total
    with torch.autocast("cpu", torch.bfloat16):
        total = DenseCriterion(mode)(low, labels, 3).total
    assert total.dtype == torch.float32
    assert torch.equal(total, plain)


@pytest.mark.parametrize("mode", MODES)
def test_gradient(mode):
    logits, labels = example(mode, images=2, side=24, dtype=torch.float64)
    criterion = DenseCriterion(mode)
    assert torch.autograd.gradcheck(lambda *levels: criterion(levels, labels, 2).total, logits, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_no_image(mode):
    logits, labels = example(mode)
    output = DenseCriterion(mode)([one[:0] for one in logits], labels[:0], 0.5)
    assert output.total == 0
    output.total.backward()


def test_shapes_that_do_not_fit():
    logits, labels = example("binary")
    for mode, levels, found in (
        ("binary", logits, labels[:2]),
        ("binary", [*logits, logits[0]], labels),
        ("binary", [], labels),
        ("binary", [logits[0].expand(-1, 2, -1, -1)], labels),
        ("multilabel", logits, labels),
        ("binary", [logits[0][..., :15, :15]], labels),
        ("binary", [logits[0].repeat(1, 1, 2, 2)], labels),
    ):
        with pytest.raises(ValueError, match="expected"):
            DenseCriterion(mode)(levels, found, 3)
