"""What files of an adapter folder are read at all: regular ones of bounded size."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from sam3lora.config.post_processing import PostProcessing
from sam3lora.errors import UserError
from sam3lora.model.adapter.folder_files import MAX_JSON_BYTES, MAX_JSON_VALUES, open_regular, read_json_object
from sam3lora.model.adapter.metadata import MAX_PROMPT_THRESHOLDS, AdapterMetadata, read_metadata
from sam3lora.model.adapter.peft_files import MAX_TENSORS, read_header

METADATA, WEIGHTS = "sam3lora.json", "adapter_model.safetensors"


def test_a_pipe_does_not_block_the_reader(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="no regular file"), open_regular(place):
            pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is damaged"),
        (b"{}" + b" " * MAX_JSON_BYTES, "too large"),
        (b'{"a": [' + b"1," * MAX_JSON_VALUES + b"1]}", "too many values"),
    ],
)
def test_json_that_is_not_read(tmp_path: Path, content: bytes, words: str):
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_json_object(tmp_path / METADATA)


@pytest.mark.parametrize(
    "values",
    [
        {"prompts": ["\ud800"]},
        {"prompts": ["a\nb"]},
        {"prompts": [1]},
        {"prompts": ["x" * 5000]},
        {"base_model": "\x00"},
        {"post_processing": {"prompt_thresholds": {str(number): 0.5 for number in range(MAX_PROMPT_THRESHOLDS + 1)}}},
        {"post_processing": {"threshold": float("nan")}},
        {"format_version": 10**400},
    ],
)
def test_metadata_that_are_refused(tmp_path: Path, values: dict):
    (tmp_path / METADATA).write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        read_metadata(tmp_path)
    assert len(str(caught.value)) < 1000


def test_prompts_of_any_language_and_a_threshold_each(tmp_path: Path):
    prompts = ["Riß", "裂缝", "צינור", "👩‍🔧", "a, b"]
    post = PostProcessing(prompt_thresholds=dict.fromkeys(prompts, 0.4))
    (tmp_path / METADATA).write_text(json.dumps(AdapterMetadata(prompts=prompts, post_processing=post).to_dict()))
    known = read_metadata(tmp_path)
    assert known is not None
    assert (known.prompts, known.post_processing) == (prompts, post)


def test_headers_of_weights_that_are_not_read(tmp_path: Path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    many = json.dumps({str(number): entry for number in range(MAX_TENSORS + 5)}).encode()
    for header, words in [
        (b"[]", "no JSON object"),
        (b"{" * 1000, "no JSON object"),
        (b"{}", "no tensors"),
        (b'{"a": 1}', "does not describe tensors"),
        (many, "too many tensors"),
        (b" " * (5 * 2**20), "too large"),
    ]:
        (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(UserError, match=words):
            read_header(tmp_path)
