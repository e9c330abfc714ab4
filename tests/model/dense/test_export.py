"""Export of dense folders: merged with the head beside the model, copied, and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sam3lora import Predictor
from sam3lora.cli import main
from sam3lora.errors import UserError
from sam3lora.model.loading import load_base
from sam3lora.model.publish.export import copy_adapter, merge_adapter
from sam3lora.model.publish.hub import check_folder

from .dense_cases import write_dense


@pytest.fixture(scope="module")
def folder(spread_base, tmp_path_factory) -> Path:
    return write_dense(spread_base, tmp_path_factory.mktemp("dense") / "best")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2.0)])
def test_merged_with_the_head_beside(folder, spread_base, pixels, tmp_path, dtype, tolerance):
    report = merge_adapter(folder, tmp_path / "merged", dtype=dtype)
    assert report.differences["logits"].relative < 1e-5
    expected = Predictor(adapter=folder, device="cpu").predict_dense(pixels)
    for model in (tmp_path / "merged", None):
        predictor = Predictor(model and str(model), adapter=tmp_path / "merged", device="cpu")
        np.testing.assert_allclose(predictor.predict_dense(pixels).logits_Nhw, expected.logits_Nhw, atol=tolerance)
    assert not list((tmp_path / "merged").glob("adapter_*"))
    merged, base = (load_base(str(path)).model for path in (tmp_path / "merged", spread_base))
    assert len(list(merged.parameters())) == len(list(base.parameters()))  # a whole SAM 3
    with pytest.raises(UserError, match="was trained on the base"):
        Predictor(str(spread_base), adapter=tmp_path / "merged", device="cpu")


def test_a_head_alone_has_nothing_to_merge(spread_base, tmp_path):
    head = write_dense(spread_base, tmp_path / "head", lora=False)
    with pytest.raises(UserError, match="no LoRA to merge"):
        merge_adapter(head, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    copied = copy_adapter(head, tmp_path / "copy")
    assert sorted(path.name for path in copied.iterdir()) == sorted(path.name for path in head.iterdir())


def test_a_damaged_head_is_no_complete_folder(folder, tmp_path):
    copied = copy_adapter(folder, tmp_path / "copy")
    (copied / "dense_head.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match=r"dense_head.safetensors is damaged"):
        check_folder(copied)


def test_what_export_says(folder, tmp_path, capsys):
    assert main(["export", "--weights", str(folder), "--merge", "--output", str(tmp_path / "merged")]) == 0
    text = capsys.readouterr().out
    assert "logits" in text
    found: dict = {}
    lines = [line.strip() for line in text.partition("use it:\n")[2].splitlines()]
    exec("\n".join(lines[:2]), found)
    assert found["predictor"].settings["classes"] == ["background", "gear", "red bolt"]
    assert "predict_dense" in lines[2]
    assert 'adapter="PATH_OF_THIS_FOLDER"' in (tmp_path / "merged" / "README.md").read_text()
