"""Mask loss on sampled points against all pixels."""

import pytest
import torch

from sam3lora.losses.masks import PointSampling, choose_points, mask_loss_sums, sample_points


@pytest.fixture
def blobs():
    """Three smooth mask predictions (32 x 32) around discs (64 x 64)."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    logits = torch.stack([8 * (radius - ((x - 0.5) ** 2 + (y - 0.4) ** 2).sqrt()) for radius in (0.2, 0.3, 0.4)])
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    masks = torch.stack([((x - 0.5) ** 2 + (y - 0.5) ** 2).sqrt() < radius for radius in (0.2, 0.3, 0.4)])
    return logits, masks, torch.arange(3)


def test_uniform_points_approximate_all_pixels(blobs):
    # Many uniform points estimate both terms; the tolerance is a few standard errors.
    full = mask_loss_sums(*blobs)
    points = mask_loss_sums(*blobs, PointSampling(50_000, importance_ratio=0.0))
    torch.testing.assert_close(points, full, rtol=0.02, atol=0)
    # A shifted target is far outside of that tolerance.
    other = mask_loss_sums(blobs[0], blobs[1].roll(12, dims=2), blobs[2])
    assert ((other - full).abs() > 0.1 * full).all()


def test_points_lie_where_the_prediction_is_uncertain(blobs):
    # With importance 1, |logit| at the points is well below that at uniform ones; the number of points is exact.
    logits = blobs[0]
    important = choose_points(logits, PointSampling(500, importance_ratio=1.0))
    uniform = choose_points(logits, PointSampling(500, importance_ratio=0.0))
    mixed = choose_points(logits, PointSampling(501, importance_ratio=0.75))
    assert important.shape == uniform.shape == (3, 500, 2)
    assert mixed.shape == (3, 501, 2)
    assert sample_points(logits, important).abs().mean() < 0.5 * sample_points(logits, uniform).abs().mean()


def test_gradient_and_seed(blobs):
    # Gradients reach the logits, chunked or not, and the seed decides the points.
    logits, masks, index = blobs
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        leaf = logits.clone().requires_grad_()
        focal, dice = mask_loss_sums(leaf, masks, index, PointSampling(200), chunk_size=2)
        (focal + dice).backward()
        assert leaf.grad.abs().amax(dim=(1, 2)).min() > 0
        values.append((focal + dice).item())
    assert values[0] == values[1]


def test_point_at_a_pixel_centre():
    # The centre of pixel (x 1, y 0) of a 2 x 2 image is (0.75, 0.25).
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert sample_points(image, torch.tensor([[[0.75, 0.25]]])).item() == pytest.approx(2.0)
