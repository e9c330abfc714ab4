"""The shipped click head of the tiny base: loaded by stock classes too, and it follows clicks, boxes and masks."""

from __future__ import annotations

import pytest
import torch
from transformers import Sam3TrackerModel

from jobs.pretrain.bank import build_bank
from jobs.pretrain.click_measure import ClickReport, measure_click_head
from jobs.pretrain.click_scenes import ClickScenes
from sam3lora.model.clicks.head import ClickHead
from sam3lora.model.clicks.loading import load_click_head
from sam3lora.model.loading import LoadedBase, load_base
from sam3lora.model.tiny import TINY_FOLDER


@pytest.fixture(scope="module")
def tiny() -> LoadedBase:
    return load_base("tiny")


@pytest.fixture(scope="module")
def tiny_head(tiny: LoadedBase) -> ClickHead:
    return load_click_head(tiny)


def _measure(tiny: LoadedBase, head: ClickHead, folder, num: int, max_clicks: int) -> ClickReport:
    bank = build_bank(folder / "bank", num, seed=4244, workers=1)
    return measure_click_head(head, ClickScenes.open(bank, tiny, folder / "tokens.safetensors"), max_clicks=max_clicks)


def test_stock_transformers_finds_every_weight(tiny_head):
    stock, info = Sam3TrackerModel.from_pretrained(TINY_FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(stock.mask_decoder.mask_tokens.weight, tiny_head.mask_decoder.mask_tokens.weight)


def test_it_follows_clicks_boxes_and_masks(tiny, tiny_head, tmp_path):
    # A quick guard on scenes that were never trained on; the full figures are in the slow test and docs/tiny_model.md.
    report = _measure(tiny, tiny_head, tmp_path, 16, max_clicks=3)
    assert report.clicks["mean_iou_1"] > 0.75
    assert report.clicks["mean_iou_3"] > 0.80
    assert report.box > 0.80
    assert report.right_mask > 0.93
    assert report.wrong_mask < 0.50  # what is shown is read: another mask, another answer


@pytest.mark.slow
def test_figures_of_the_shipped_click_head(tiny, tiny_head, tmp_path):
    report = _measure(tiny, tiny_head, tmp_path, 100, max_clicks=8)
    assert report.objects > 300
    assert report.clicks["mean_iou_1"] > 0.80
    assert report.clicks["mean_iou_3"] > 0.85
    assert report.clicks["mean_iou_8"] > 0.87
    assert report.clicks["noc_85"] < 2.8
    assert report.right_mask > 0.94
