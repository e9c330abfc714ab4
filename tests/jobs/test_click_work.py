"""Clicks at full size, counted without a GPU."""

from __future__ import annotations

from jobs.bench.click_work import answer_rows, training_peak_bytes


def test_objects_share_the_kernels_and_fit_in_memory():
    of_image, one, four, sixteen = answer_rows()
    assert of_image["kernels"] <= 13
    assert one["kernels"] <= 208
    assert four["kernels"] == sixteen["kernels"] <= 214
    assert sixteen["MB"] < 16 * one["MB"] < 520


def test_a_training_step_fits_a_card_of_8_gb():
    logits = 16 * 3 * 288 * 288 * 4  # of 16 objects with three masks each, in float32
    assert 2 * logits + 2 * 446e6 < training_peak_bytes(4) < 3.6e9
