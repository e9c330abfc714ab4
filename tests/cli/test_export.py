"""`sam3lora export`: what it prints and writes, and which options belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sam3lora.cli import main


@pytest.fixture(scope="module")
def adapter(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does something; read only."""
    from ..model.conftest import write_adapter

    return write_adapter(small_base, tmp_path_factory.mktemp("run") / "best", prompts=["crack"])


def test_merge_prints_its_check_and_code_that_runs(adapter, tmp_path, capsys):
    # The figures of all four outputs, the dtype, and lines that load what was written.
    merged = tmp_path / "merged"
    assert main(["export", "--weights", str(adapter), "--merge", "--output", str(merged), "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"merged \d+ modules into .* at 112 pixels", text)
    assert "before their cast to bfloat16" in text
    for name in ("logits", "presence", "boxes", "masks"):
        assert re.search(rf"^  {name} +\S+e-\d\d +\(\S+e-\d\d of the largest value", text, re.MULTILINE), name
    found: dict = {}
    exec("\n".join(line.strip() for line in text.partition("use it:\n")[2].splitlines()), found)
    assert found["model"].config.image_size == found["processor"].target_size == 112


def test_without_merge_the_adapter_is_checked_and_copied(adapter, tmp_path, capsys):
    assert main(["export", "--weights", str(adapter)]) == 0
    assert main(["export", "--weights", str(adapter), "--output", str(tmp_path / "copy")]) == 0
    text = capsys.readouterr().out
    assert "is complete: README.md" in text
    assert f'adapter="{tmp_path / "copy"}"' in text
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == sorted(
        file.name for file in adapter.iterdir()
    )


def test_dry_run_lists_the_upload(adapter, capsys):
    words = ["export", "--weights", str(adapter), "--push-to", "me/cracks", "--dry-run"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "4 files would go to me/cracks, private" in text
    assert re.search(r"kB  adapter_model\.safetensors", text)
    assert "| library_name: peft" in text
    assert main([*words, "--public"]) == 0
    assert "me/cracks, public" in capsys.readouterr().out
