"""Starts and clicks of training: in the right place, with the right label, within the input, the same by seed."""

from __future__ import annotations

import pytest
import torch

from sam3lora.config.clicks import StartShares
from sam3lora.training.clicks.sampling import (
    Prompts,
    draw_start,
    jittered_boxes,
    next_clicks,
    start_prompts,
    wrong_masks,
)

HEIGHT, WIDTH, SIDE = 24, 32, 96  # a pixel of a mask is 3 x 4 of the input


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square(x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def pixels_of(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column (N,) of the pixel of the mask in whose middle a point (N, 1, 2) lies, for the prompt encoder."""
    x, y = ((points[:, 0] + 0.5) * torch.tensor([WIDTH / SIDE, HEIGHT / SIDE])).unbind(dim=1)
    torch.testing.assert_close(x % 1, torch.full_like(x, 0.5))
    torch.testing.assert_close(y % 1, torch.full_like(y, 0.5))
    return y.long(), x.long()


def hit(masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(N,) the value of each object's mask at its point."""
    y, x = pixels_of(points)
    return masks[torch.arange(len(masks)), y, x]


@pytest.fixture
def objects() -> torch.Tensor:
    """Objects of every size: a pixel, a line, squares, half the image."""
    shapes = [(5, 5, 6, 6), (0, 3, 32, 4), (2, 2, 12, 12), (20, 10, 30, 22), (0, 0, 16, 24), (31, 23, 32, 24)]
    return torch.stack([square(*shape) for shape in shapes])


def test_first_click_lies_anywhere_in_its_object(objects):
    many = objects.repeat(500, 1, 1)
    points, labels = next_clicks(many, None, SIDE, seeded())
    assert points.shape == (len(many), 1, 2)
    assert points.dtype == torch.float32
    assert labels.eq(1).all()
    assert hit(many, points).all()
    # the line is clicked on its whole length
    columns = pixels_of(points)[1][1::6]
    assert columns.unique().numel() == WIDTH
    assert 12 < columns.float().mean() < 19


def test_corrections_lie_in_the_error_with_its_label():
    # Missed: 4 rows of 10. Found wrongly: 1 row of 10. Each pixel of both is as likely as another.
    truth, found = square(5, 5, 15, 15), square(5, 9, 15, 16)
    many, seen = truth.expand(4000, -1, -1), found.expand(4000, -1, -1)
    points, labels = next_clicks(many, seen, SIDE, seeded(), from_object=0)
    assert hit(many ^ seen, points).all()
    assert torch.equal(hit(many, points), labels[:, 0] == 1)
    assert abs(labels.float().mean().item() - 0.8) < 0.03


def test_some_corrections_are_drawn_from_the_object():
    # The object is found, with one wrong pixel besides.
    truth = square(5, 5, 15, 15)
    found = truth | square(20, 20, 21, 21)
    many, seen = truth.expand(4000, -1, -1), found.expand(4000, -1, -1)
    _, labels = next_clicks(many, seen, SIDE, seeded())
    assert abs(labels.float().mean().item() - 0.1) < 0.02
    _, labels = next_clicks(many, seen, SIDE, seeded(), from_object=1)
    assert labels.eq(1).all()


def test_where_nothing_is_wrong_the_background_is_clicked():
    everything, nothing = square(0, 0, WIDTH, HEIGHT), square(0, 0, 0, 0)
    truth = torch.stack([square(5, 5, 15, 15), nothing, everything])
    points, labels = next_clicks(truth, truth, SIDE, seeded(), from_object=0)
    # without background there is only the object
    assert labels[:, 0].tolist() == [0, 0, 1]
    assert hit(truth, points).tolist() == [False, False, True]
    # an empty object has no pixel to draw a first click from, or one instead of an error
    for found in (None, square(3, 3, 6, 6)[None]):
        points, labels = next_clicks(nothing[None], found, SIDE, seeded(), from_object=1)
        assert labels.item() == 0
        if found is not None:
            assert hit(found, points).item()


def test_boxes_are_a_little_off_and_stay_inside(objects):
    many = objects.repeat(300, 1, 1)
    boxes = jittered_boxes(many, SIDE, seeded()).view(300, 6, 4)
    exact = torch.tensor([[2, 2, 12, 12], [20, 10, 30, 22]]) * torch.tensor([3, 4, 3, 4])
    for row, true_box in zip((2, 3), exact):
        off = (boxes[:, row] - true_box).abs()
        reach = 0.1 * (true_box[2:] - true_box[:2]).repeat(2)
        assert (off <= reach + 1e-4).all()
        assert (off.amax(dim=0) > 0.9 * reach).all()
        assert ((boxes[:, row] - true_box).mean(dim=0).abs() < 0.15 * reach).all()
    assert boxes.min() >= 0
    assert boxes.max() <= SIDE
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    # at most 20 pixels of a large box
    large = jittered_boxes(square(4, 3, 28, 21).expand(300, -1, -1), 1000, seeded())
    assert 19 < (large - torch.tensor([125, 125, 875, 875])).abs().max() <= 20


def test_starts():
    objects = torch.stack([square(2, 2, 12, 12), square(20, 10, 30, 22)])
    click = start_prompts("click", objects, SIDE, seeded())
    assert click.multimask
    assert (click.boxes_xyxy_N4, click.masks_Nhw) == (None, None)
    assert hit(objects, click.points_Nk2).all()

    box = start_prompts("box", objects, SIDE, seeded())
    assert (box.points_Nk2.shape, box.labels_Nk.shape) == ((2, 0, 2), (2, 0))
    assert box.labels_Nk.dtype == torch.int64
    assert (box.multimask, box.masks_Nhw) == (False, None)

    for name in ("mask", "mask_and_box"):
        mask = start_prompts(name, objects, SIDE, seeded())
        assert not mask.multimask
        assert (mask.boxes_xyxy_N4 is not None) == (name == "mask_and_box")
        assert mask.masks_Nhw.unique().tolist() == [-8, 8]
        wrong = mask.masks_Nhw > 0
        # the click corrects that mask
        assert hit(objects ^ wrong, mask.points_Nk2).all()
        assert torch.equal(hit(objects, mask.points_Nk2), mask.labels_Nk[:, 0] == 1)


def test_a_further_prompt_keeps_the_earlier_clicks_and_the_box():
    first = start_prompts("box", torch.stack([square(2, 2, 12, 12)] * 2), SIDE, seeded())
    logits = torch.full((2, 4, 4), 100.0, requires_grad=True)
    points, labels = torch.ones(2, 1, 2), torch.tensor([[1], [0]])
    second = first.then(points, labels, logits).then(points + 1, labels, logits)
    assert second.points_Nk2.tolist() == [[[1, 1], [2, 2]]] * 2
    assert second.labels_Nk.tolist() == [[1, 1], [0, 0]]
    assert second.boxes_xyxy_N4 is first.boxes_xyxy_N4
    assert not second.masks_Nhw.requires_grad
    assert second.masks_Nhw.unique().tolist() == [32]
    assert not Prompts(points, labels, masks_Nhw=logits).multimask


def test_wrong_masks_are_wrong_in_four_ways():
    # One object of 100 pixels with a neighbour in its image, and one alone in another image.
    neighbour = square(20, 10, 30, 20)
    objects = torch.stack([square(3, 3, 13, 13), neighbour, square(3, 3, 13, 13)])
    image_index = torch.tensor([0, 0, 1])
    ways = {"half": 0, "larger": 0, "smaller": 0, "joined": 0}
    for seed in range(60):
        joined_or_not, _, alone = wrong_masks(objects, seeded(seed), image_index)
        for mask, has_neighbour in ((joined_or_not, True), (alone, False)):
            area = int(mask.sum())
            assert mask.any()
            assert not torch.equal(mask, objects[0])
            if area > 100:
                assert (mask | ~objects[0]).all()
                if (mask & neighbour).sum() == 100:
                    assert has_neighbour
                    assert area == 200
                    ways["joined"] += 1
                else:
                    assert area in (12**2, 14**2, 16**2)
                    ways["larger"] += 1
            else:
                assert not (mask & ~objects[0]).any()
                ways["smaller" if area in (8**2, 6**2, 4**2) else "half"] += 1
    # 120 masks: a quarter each, but for the one that is alone and grows instead of being joined
    assert min(ways.values()) > 5
    assert ways["larger"] > ways["joined"]


def test_a_thin_object_is_cut_where_it_cannot_shrink():
    line = square(4, 10, 28, 11)[None]
    for seed in range(20):
        wrong = wrong_masks(line, seeded(seed))[0]
        assert wrong.any()
        assert not torch.equal(wrong, line[0])


def test_the_seed_decides():
    objects = torch.stack([square(2, 2, 12, 12), square(20, 10, 30, 22)])

    def drawn(seed):
        prompts = start_prompts("mask_and_box", objects, SIDE, seeded(seed), torch.zeros(2, dtype=torch.long))
        return torch.cat([prompts.points_Nk2.flatten(), prompts.boxes_xyxy_N4.flatten(), prompts.masks_Nhw.flatten()])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_shares_of_the_starts():
    generator = seeded()
    shares = StartShares(click=0.2, box=0.3, mask=0.5)
    drawn = [draw_start(shares, generator) for _ in range(1000)]
    assert "mask_and_box" not in drawn
    for name, share in (("click", 0.2), ("box", 0.3), ("mask", 0.5)):
        assert abs(drawn.count(name) / 1000 - share) < 0.05
    for name in ("click", "box", "mask", "mask_and_box"):
        alone = StartShares(**({"click": 0, "box": 0} | {name: 0.1}))
        assert {draw_start(alone, generator) for _ in range(5)} == {name}
    for wrong in ({"click": 0, "box": 0}, {"box": -0.1}):
        with pytest.raises(ValueError, match=r"shares are 0|greater than or equal to 0"):
            StartShares(**wrong)
