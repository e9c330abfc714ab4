"""The shipped tiny SAM 3: small, complete, loaded like any folder, and it listens to its prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Sam3Model, Sam3Processor

from jobs.pretrain.bank import SceneBank, build_bank
from jobs.pretrain.measure import TinyReport, measure
from sam3lora.data.synth.scenes import WORDS
from sam3lora.model.loading import load_base, tokenize
from sam3lora.model.staged.forward import StagedSam3
from sam3lora.model.tiny import TINY_FOLDER


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny")


def _measure(tiny, bank: SceneBank, num_images: int) -> TinyReport:
    return measure(
        StagedSam3(tiny.model), lambda prompts: tokenize(tiny.tokenizer, prompts), bank, num_images=num_images
    )


def test_it_is_small_and_safe():
    # Under 8 MB, float16 safetensors, and nothing that would have to be unpickled.
    files = {path.name: path.stat().st_size for path in TINY_FOLDER.iterdir()}
    assert sum(files.values()) < 8e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= set(files)
    assert not [name for name in files if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_name_and_the_folder_are_one_model(tiny):
    by_folder = load_base(str(TINY_FOLDER))
    assert by_folder.fingerprint == tiny.fingerprint
    assert by_folder.resolution == tiny.resolution == 224


def test_stock_transformers_runs_it(tiny):
    # Model and processor load without this package, and the stock forward gives the staged numbers.
    model, processor = Sam3Model.from_pretrained(TINY_FOLDER).float().eval(), Sam3Processor.from_pretrained(TINY_FOLDER)
    image = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    inputs = processor(images=image, text="red star", return_tensors="pt")
    padding = {"input_boxes": torch.full((1, 1, 4), -10.0), "input_boxes_labels": torch.full((1, 1), -10)}
    staged = StagedSam3(tiny.model)
    with torch.no_grad():
        stock = model(**{name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}, **padding)
        row = torch.zeros(1, dtype=torch.long)
        text = staged.encode_text(*tokenize(tiny.tokenizer, ["red star"]))
        found = staged.detect(staged.encode_images(inputs["pixel_values"]), text, row, row)
    torch.testing.assert_close(found.logits_LBQ[-1], stock.pred_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("word", WORDS)
def test_a_known_word_is_one_token(tiny, word):
    assert tiny.tokenizer.tokenize(word) == [f"{word}</w>"]


@pytest.mark.parametrize("text", ["zebra", "Strawberry", "crème brûlée", "焊缝缺陷", "weld-defect no. 7!"])
def test_other_text_is_encoded_without_loss(tiny, text):
    ids = tiny.tokenizer(text, add_special_tokens=False).input_ids
    assert tiny.tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_it_listens_to_the_prompt(tiny, tmp_path):
    # A quick guard on scenes that were never trained on; the full figures are in the slow test and docs/tiny_model.md.
    report = _measure(tiny, build_bank(tmp_path / "bank", 24, seed=4242, workers=1), 24)
    assert report.map_50 > 0.65
    assert report.presence_accuracy > 0.85
    assert report.unknown_absent == 1.0
    shape = report.pairs["shape"]
    assert shape[1] > 0.85
    assert shape[2] > 0.8


@pytest.mark.slow
def test_figures_of_the_shipped_model(tiny, tmp_path):
    # The pair table guards against a model that returns everything whatever it is asked (see pretrain/measure.py).
    report = _measure(tiny, build_bank(tmp_path / "bank", 250, seed=4243, workers=1), 250)
    assert report.map_50 > 0.70
    assert report.presence_accuracy > 0.92
    assert report.unknown_absent > 0.95
    for kind, (count, above, below) in report.pairs.items():
        assert count >= 20, kind
        assert above > 0.93, kind
        assert below > 0.9, kind
