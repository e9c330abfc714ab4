"""What is kept of tokens, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam3lora.training.features.codec import FeatureForm

CPU = torch.device("cpu")


def tokens(num: int, channels: int) -> torch.Tensor:
    return torch.randn(num, channels, generator=torch.Generator().manual_seed(0))


def through_a_file(form: FeatureForm, tokens_SC: torch.Tensor, tmp_path) -> torch.Tensor:
    array = form.to_array(form.pack(tokens_SC))
    assert array.nbytes == form.num_bytes
    np.save(tmp_path / "array.npy", array)
    return form.unpack(form.from_array(np.load(tmp_path / "array.npy")), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_they_are(tmp_path, dtype):
    made = tokens(6, 32).to(dtype)
    found = through_a_file(FeatureForm((6, 32), dtype), made, tmp_path)
    assert found.dtype == dtype
    assert torch.equal(found, made)


@pytest.mark.parametrize(("channels", "num_blocks"), [(128, 2), (32, 1), (96, 1)])
def test_int8_is_half_a_step_off_at_most(tmp_path, channels, num_blocks):
    made = tokens(6, channels)
    made[2] = 0
    form = FeatureForm((6, channels), torch.float32, int8=True)
    assert form.num_bytes == 6 * (channels + 4 * num_blocks)
    found = through_a_file(form, made, tmp_path)
    steps = made.unflatten(1, (num_blocks, -1)).abs().amax(2, keepdim=True) / 127
    off = (found - made).unflatten(1, (num_blocks, -1)).abs()
    assert (off <= 0.5001 * steps).all()
    assert (off.amax(2)[[0, 1, 3]] > 0).all()
    assert torch.equal(found[2], made[2])
    assert (found - made).norm() / made.norm() < 0.01


def test_int8_of_whole_steps_is_exact(tmp_path):
    # 127 is the largest of its block, so the step is 1; the other block has steps of 0.5.
    made = torch.zeros(1, 128)
    made[0, :4] = torch.tensor([127.0, -127.0, 3.0, -1.0])
    made[0, 64:67] = torch.tensor([-63.5, 0.5, 10.0])
    assert torch.equal(through_a_file(FeatureForm((1, 128), torch.float32, int8=True), made, tmp_path), made)
    half = FeatureForm((1, 128), torch.bfloat16, int8=True)
    assert torch.equal(through_a_file(half, made, tmp_path), made.bfloat16())


def test_a_large_channel_spoils_its_own_block_only(tmp_path):
    made = tokens(6, 128)
    plain = through_a_file(FeatureForm((6, 128), torch.float32, int8=True), made, tmp_path)
    made[:, 5] = 1000.0
    spoilt = through_a_file(FeatureForm((6, 128), torch.float32, int8=True), made, tmp_path)
    assert torch.equal(spoilt[:, 64:], plain[:, 64:])
    assert not torch.equal(spoilt[:, 6:64], plain[:, 6:64])


def test_not_a_number_stays_one(tmp_path):
    made = tokens(2, 64)
    made[0, 7] = torch.nan
    found = through_a_file(FeatureForm((2, 64), torch.float32, int8=True), made, tmp_path)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.float32), np.zeros((6, 32), np.uint16), np.zeros(3, np.uint8)])
def test_another_shape_or_type_is_none_of_it(array):
    assert FeatureForm((6, 32), torch.float32).from_array(array) is None
    assert FeatureForm((6, 32), torch.bfloat16, int8=True).from_array(array) is None
