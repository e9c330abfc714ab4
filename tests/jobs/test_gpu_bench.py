"""The GPU benchmark on a CPU: its rows, its time limits, what is kept from an earlier call, its tables and goals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jobs.bench import gpu
from jobs.bench.gpu import GpuReport, main, measure_gpu
from jobs.bench.gpu_cases import GpuCase, measure_cases
from jobs.bench.gpu_goals import goals_of
from jobs.bench.gpu_timing import median_ms
from jobs.bench.tables import text_table
from sam3lora.errors import UserError

REPOSITORY = Path(__file__).parents[2]
MINIMAL = ["--model", "tiny", "--device", "cpu", "--repeats", "1", "--presets", "light"]
MINIMAL += ["--batches", "1", "--prompts", "1"]


# ---- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_program_on_a_cpu_without_the_packages_that_a_bare_machine_lacks(tmp_path):
    path = tmp_path / "new" / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-c", BARE, *MINIMAL, "--json", path], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    sections = json.loads(path.read_text())["sections"]
    assert [row["attention"] for row in sections["attention"]] == ["fused everywhere"] * 2
    assert [row["graphs"] for row in sections["engine"]] == ["on", "off"]
    assert sections["inference"][0]["vision ms"] > 0
    assert {row["way"] for row in sections["stock"]} == {
        "transformers, float32",
        "transformers, bfloat16",
        "transformers, bfloat16, vision_embeds kept",
    }
    assert all(row["first call ms"] > 0 for row in sections["stock"])
    ways = [(row["way"], row["prompts at a time"]) for row in sections["training"]]
    assert ways == [
        ("sam3lora", "auto"),
        ("sam3lora, trunk cached", "auto"),
        ("sam3lora", 1),
        ("sam3lora", 8),
        ("transformers + PEFT", "pair by pair"),
    ]
    losses = [row["loss"] for row in sections["training"] if row["way"] == "sam3lora"]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.02)  # however many prompts at a time
    assert all(row["bank ms"] > 0 and row["PEFT ms"] > 0 for row in sections["adapters"])
    assert {row["note"] for row in sections["cards"]} == {"needs a GPU"}
    assert all(row["note"].startswith("needs ") for row in sections["serving"])


BARE = """
import sys

class Without:
    names = {"ray", "typer", "rich", "pyarrow", "optuna", "cv2", "pycocotools", "fastapi", "pandas", "aiohttp"}
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from jobs.bench.gpu import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def sections(monkeypatch):
    """Two sections whose cases say how often they were measured."""
    counts = {"first": 0, "second": 0}

    def cases(*_, **__):
        def measure(name):
            counts[name] += 1
            return {"value": counts[name]}

        for name in counts:
            yield GpuCase({"case": name}, lambda name=name: measure(name))

    for name in ("attention_cases", "adapter_cases"):
        monkeypatch.setattr(gpu, name, cases)
    return counts


def test_what_a_file_holds_is_not_measured_again(sections, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    options = ["--model", "tiny", "--device", "cpu", "--json", str(path)]

    def values(*more):
        assert main([*options, *more]) == 0
        found = json.loads(path.read_text())["sections"]
        return {name: [row["value"] for row in rows] for name, rows in found.items()}

    assert values("--sections", "attention") == {"attention": [1, 1]}
    assert values("--sections", "attention", "adapters") == {"attention": [1, 1], "adapters": [2, 2]}
    assert values("--sections", "adapters", "--again", "attention") == {"adapters": [2, 2]}
    assert values("--sections", "attention", "adapters", "--again", "adapters") == {
        "adapters": [4, 4],
        "attention": [3, 3],
    }
    # Only the row that could not be measured is measured again.
    found = json.loads(path.read_text())
    found["sections"]["attention"][1] = {"case": "second", "note": "failed: RuntimeError: gone"}
    path.write_text(json.dumps(found))
    assert values("--sections", "attention")["attention"] == [3, 5]
    # A file of another model, or of something else, is a mistake.
    for content in (json.dumps(found | {"settings": {"model": "other"}}), "{}", "[1]", "nothing"):
        path.write_text(content)
        assert main([*options, "--sections", "attention"]) == 2
        assert path.read_text() == content
        assert "Traceback" not in capsys.readouterr().err


def test_a_row_is_written_the_moment_it_is_known(monkeypatch, tmp_path):
    path, seen = tmp_path / "gpu.json", []

    def cases(*_):
        for number in range(3):
            yield GpuCase(
                {"case": number}, lambda: seen.append(path.exists() and path.read_text().count('"case"')) or {}
            )

    monkeypatch.setattr(gpu, "attention_cases", cases)
    main(["--model", "tiny", "--device", "cpu", "--json", str(path), "--sections", "attention"])
    assert seen == [False, 1, 2]


def test_wrong_section_or_model():
    with pytest.raises(UserError, match="sections must be of"):
        measure_gpu("tiny", "cpu", sections=["vision"])
    with pytest.raises(UserError, match="model must be one of"):
        measure_gpu("huge", "cpu")


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_a_section_ends_in_time_and_says_what_it_left_out():
    cpu = torch.device("cpu")

    def slow():
        return {"ms": median_ms(lambda: time.sleep(0.05), cpu, repeats=1000)}

    cases = [
        GpuCase({"case": 0}, lambda: {"value": 0}),
        GpuCase({"case": 1}, slow),
        GpuCase({"case": 2}, slow),
    ]
    start = time.monotonic()
    fast, cut, left_out = measure_cases(cases, [], limit_s=0.5)
    assert time.monotonic() - start < 20  # and not 50
    assert fast == {"case": 0, "value": 0}
    assert cut["note"].startswith("cut")
    assert left_out["note"].startswith("left out")
    assert median_ms(lambda: None, cpu, repeats=1) >= 0  # nothing of the limit remains


def test_what_goes_wrong_in_a_case_is_its_row():
    def fail(error):
        raise error

    errors = [torch.OutOfMemoryError("2 GiB"), ModuleNotFoundError("no", name="ray"), ValueError("odd\nmore")]
    cases = [GpuCase({"case": n}, lambda error=error: fail(error)) for n, error in enumerate(errors)]
    notes = [row["note"] for row in measure_cases(cases, [], limit_s=9)]
    assert notes == ["out of memory", "needs ray", "failed: ValueError: odd"]
    report = GpuReport({"gpu": None}, {"model": "tiny"}, {"training": [{"note": notes[0]}, {"note": notes[1]}]})
    assert not report.failed
    report.sections["training"].append({"note": notes[2]})
    assert report.failed


# ---- goals and tables ------------------------------------------------------------------------------------------------


def test_goals_compare_with_a_limit_or_with_another_row():
    def training(preset, way, prompts, **values):
        return {"preset": preset, "images": 1, "way": way, "prompts at a time": prompts, **values}

    rows = [
        training("light", "sam3lora", 1, **{"peak GB": 3.5}),
        training("balanced", "sam3lora", "auto", **{"peak GB": 9.0, "images/s": 6.0}),
        training("balanced", "transformers + PEFT", "pair by pair", **{"peak GB": 30.0, "images/s": 1.5}),
        training("full", "sam3lora", "auto", note="out of memory"),
    ]
    met = {row["goal"]: (row["measured"], row["met"]) for row in goals_of({"training": rows})}
    assert met == {
        "balanced: images/s": (6.0, "yes"),
        "balanced: times stock + PEFT": (4.0, "yes"),
        "light, 1 prompt at a time: GB": (3.5, "yes"),
        "balanced, 1 image: GB": (9.0, "no"),
    }
    report = GpuReport({"gpu": "a GPU"}, {"model": "facebook/sam3"}, {"training": rows})
    assert len(report.goals()) == 4
    report.machine["gpu"] = None
    assert not report.goals()


ROWS = [{"way": "ours", "images/s": 12.345, "peak memory GB": 3}, {"way": "the plain way", "images/s": 345.6}]


def test_a_narrow_table_has_one_line_a_row():
    assert text_table(ROWS) == [
        "way            images/s  peak memory GB",
        "-------------  --------  --------------",
        "ours               12.3               3",
        "the plain way       346               -",
    ]


def test_headings_break_before_columns_move():
    assert text_table(ROWS, width=34) == [
        "                           peak",
        "                         memory",
        "way            images/s      GB",
        "-------------  --------  ------",
        "ours               12.3       3",
        "the plain way       346       -",
    ]


def test_columns_without_room_follow_below():
    assert text_table(ROWS, width=25) == [
        "way            images/s",
        "-------------  --------",
        "ours               12.3",
        "the plain way       346",
        "",
        "                 peak",
        "               memory",
        "way                GB",
        "-------------  ------",
        "ours                3",
    ]


def test_long_words_in_a_cell_break():
    note = "failed: RuntimeError: a message that is much longer than a column"
    lines = text_table([{"case": "one", "note": note}], width=80)
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(line[6:] for line in lines[2:]).split()) == note
