"""A folder that cannot be made ends the jobs of the tiny model with one sentence."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from jobs.bench.scripts import make_output_folder

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.mark.parametrize("job", ["pretrain_tiny.py", "pretrain_clicks.py"])
def test_a_bad_path_is_one_sentence(job, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    refused = {"file": "cannot make the folder", "file/below": "cannot make the folder", "s3://a/b": "is an address"}
    for path, said in refused.items():
        monkeypatch.setattr(sys, "argv", [job, "--output-dir", path if "//" in path else str(tmp_path / path)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOBS / job), run_name="__main__")
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: --output-dir")
        assert said in printed
        assert printed.count("\n") == 1


def test_a_folder_is_made_with_those_around_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_output_folder(Path("new/run"), "--output-dir") == tmp_path / "new" / "run"
    assert (tmp_path / "new" / "run").is_dir()
