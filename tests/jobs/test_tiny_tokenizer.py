"""The tiny model's tokenizer: a token a known word, and any text at all."""

from __future__ import annotations

import pytest

from jobs.pretrain.tiny_model import write_tokenizer
from sam3lora.data.synth.scenes import WORDS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    size = write_tokenizer(folder, WORDS)
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    assert len(tokenizer) == size
    return tokenizer


@pytest.mark.parametrize("word", WORDS)
def test_a_known_word_is_one_token(tokenizer, word):
    assert tokenizer.tokenize(word) == [f"{word}</w>"]


@pytest.mark.parametrize("text", ["zebra", "Strawberry", "crème brûlée", "焊缝缺陷", "weld-defect no. 7!"])
def test_other_text_is_encoded_without_loss(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoded = tokenizer.decode(ids).replace(" ", "")
    assert decoded == text.lower().replace(" ", "")
