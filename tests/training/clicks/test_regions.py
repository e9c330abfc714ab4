"""Random pixels, boxes, and masks grown, shrunk and cut: by hand, and for objects of a batch one by one."""

from __future__ import annotations

import pytest
import torch

from sam3lora.training.clicks.regions import boxes_of, grown, half_of, max_radius, random_true, shrunk


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square(x0: int, y0: int, x1: int, y1: int, height: int = 16, width: int = 16) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_each_pixel_of_a_region_is_equally_likely():
    region = torch.tensor([False, True, True, False, False, True, False, True, False]).expand(8000, -1)
    counts = random_true(region, seeded()).bincount(minlength=9)
    assert counts[~region[0]].tolist() == [0] * 5
    # 2000 each, with a standard deviation of 39
    assert (counts[region[0]] - 2000).abs().max() < 160


def test_rows_draw_from_their_own_region():
    regions = torch.tensor([[True, False, False], [False, False, True], [False, False, False], [True, True, True]])
    for seed in range(10):
        drawn = random_true(regions, seeded(seed))
        assert drawn[:3].tolist() == [0, 2, 0]  # the first pixel where there is nothing to draw from
        assert torch.equal(drawn, random_true(regions, seeded(seed)))
    assert random_true(regions[:0], seeded()).shape == (0,)


def test_boxes():
    masks = torch.stack([square(2, 3, 7, 5, 8, 10), square(9, 7, 10, 8, 8, 10), square(0, 0, 10, 8, 8, 10)])
    # the box ends behind the last pixel
    assert boxes_of(masks).tolist() == [[2, 3, 7, 5], [9, 7, 10, 8], [0, 0, 10, 8]]
    two_parts = square(1, 1, 2, 2) | square(12, 9, 14, 10)
    assert boxes_of(torch.stack([two_parts, two_parts & False])).tolist() == [[1, 1, 14, 10], [0, 0, 0, 0]]


def test_each_mask_grows_and_shrinks_by_its_own_radius():
    masks = torch.stack([square(4, 6, 9, 11)] * 3)
    radius = torch.tensor([0, 1, 2])
    assert torch.equal(
        grown(masks, radius), torch.stack([square(4, 6, 9, 11), square(3, 5, 10, 12), square(2, 4, 11, 13)])
    )
    assert torch.equal(
        shrunk(masks, radius), torch.stack([square(4, 6, 9, 11), square(5, 7, 8, 10), square(6, 8, 7, 9)])
    )
    assert max_radius(masks) == 2
    # at the border there is nothing to take away from
    edge = square(0, 0, 6, 6)[None]
    assert torch.equal(shrunk(edge, radius[1:2])[0], square(0, 0, 5, 5))


@pytest.mark.parametrize("seed", range(5))
def test_half_of_a_mask(seed):
    masks = torch.stack([square(2, 3, 14, 15), square(5, 0, 6, 16), square(3, 3, 4, 4)])
    halves = half_of(masks, seeded(seed))
    assert not (halves & ~masks).any()
    shares = halves.sum(dim=(1, 2)) / masks.sum(dim=(1, 2))
    assert 0.4 < shares[0] < 0.6
    assert shares[2] == 1  # a pixel has no half
    # on one side: its centre is off that of the whole
    y, x = halves[0].nonzero().float().mean(dim=0)
    assert (y - 8.5).hypot(x - 7.5) > 2
