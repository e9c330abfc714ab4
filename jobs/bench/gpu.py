"""SAM 3 at full size on one GPU, with random weights: training and inference, their parts, memory, and the goals.

    python -m jobs.bench.gpu --json gpu.json
    python -m jobs.bench.gpu --model tiny --device cpu --repeats 1      the same program, tried without a GPU

Each section has a time limit of its own, so the whole takes less than six minutes; "compiled" is measured only if it is
named. A row is printed and written to the JSON file the moment it is known. With a file that exists, only what it lacks
is measured, and what --again names.

Needs torch, transformers, PEFT, SciPy and NumPy; run-length codes need pycocotools and OpenCV, serving needs all.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from jobs.bench.gpu_adapters import adapter_cases, attention_cases
from jobs.bench.gpu_cards import card_cases
from jobs.bench.gpu_cases import GpuCase, is_finished, measure_cases
from jobs.bench.gpu_engine import engine_cases
from jobs.bench.gpu_goals import goals_of
from jobs.bench.gpu_inference import compiled_cases, inference_cases
from jobs.bench.gpu_serving import serving_cases
from jobs.bench.gpu_stock import stock_cases
from jobs.bench.gpu_timing import Row
from jobs.bench.gpu_training import PRESETS
from jobs.bench.gpu_training_rows import training_cases
from jobs.bench.models import CONFIGS, FULL_SIZE
from jobs.bench.tables import as_text, text_table
from sam3lora.errors import UserError

LIMITS_S = {
    "attention": 10,
    "engine": 55,
    "inference": 35,
    "stock": 20,
    "training": 80,
    "cards": 30,
    "adapters": 15,
    "serving": 100,
    "compiled": 90,
}
"""Seconds of each section, in their order."""

DEFAULT = tuple(name for name in LIMITS_S if name != "compiled")

KEYS = {"engine": 2, "inference": 2, "compiled": 2, "stock": 2, "training": 4, "cards": 2, "serving": 2}
"""First columns, which tell the rows of a section from each other."""


@dataclass
class GpuReport:
    """Rows of each section, and the goals that they meet or miss."""

    machine: Row
    settings: Row
    sections: dict[str, list[Row]] = field(default_factory=dict)

    def goals(self) -> list[Row]:
        """Those whose figures were measured: on a GPU at full size."""
        at_full_size = self.machine["gpu"] and self.settings["model"] == FULL_SIZE
        return goals_of(self.sections) if at_full_size else []

    @property
    def failed(self) -> bool:
        """Whether something could not be measured; memory or time that ran out is a result."""
        return any(row.get("note", "").startswith("failed") for rows in self.sections.values() for row in rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "goals": self.goals()}

    def text(self, width: int = 80) -> str:
        lines = [", ".join(f"{name}: {value}" for name, value in (self.machine | self.settings).items())]
        for name, rows in (self.sections | {"goals": self.goals()}).items():
            if rows:
                lines += ["", name, "", *text_table(rows, width=width, keys=KEYS.get(name, 1))]
        if not self.machine["gpu"]:
            lines += ["", "peak memory, compilation and the goals need a GPU"]
        return "\n".join(lines)


def measure_gpu(
    model: str = FULL_SIZE,
    device: str | None = None,
    *,
    sections: Sequence[str] = DEFAULT,
    repeats: int = 12,
    prompts: Sequence[int] = (1, 8, 32),
    presets: Sequence[str] = ("light", "balanced", "full", "maximum"),
    batches: Sequence[int] = (1, 2, 4),
    known: GpuReport | None = None,
    after_row: Callable[[GpuReport, str, Row], None] = lambda report, section, row: None,
) -> GpuReport:
    """Measure the sections; what fails in one case is a row of it, and the others go on.

    Args:
        model: A configuration, filled with random weights.
        device: None takes a GPU if there is one.
        sections: Of `LIMITS_S`.
        repeats: Calls whose median counts; of training steps a quarter.
        prompts: Numbers of prompts on the image of inference.
        presets: To train.
        batches: Numbers of images in a training batch.
        known: What an earlier call found: not measured again.
        after_row: Gets the report so far, the section and its new row.

    Raises:
        UserError: No such model or section, a GPU is asked for and there is none, or `known` is of something else.
    """
    for section in sections:
        if section not in LIMITS_S:
            raise UserError(f"sections must be of {', '.join(LIMITS_S)}, got {section!r}")
    if model not in CONFIGS:
        raise UserError(f"model must be one of {', '.join(CONFIGS)}, got {model!r}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here: use --device cpu, with --model tiny")
    few, steps = min(repeats, 3), max(1, repeats // 4)
    cases: dict[str, Callable[[], Iterable[GpuCase]]] = {
        "attention": lambda: attention_cases(model, where),
        "engine": lambda: engine_cases(model, where, prompts=prompts, repeats=repeats),
        "inference": lambda: inference_cases(model, where, prompts=prompts, repeats=repeats),
        "compiled": lambda: compiled_cases(model, where, repeats=repeats),
        "stock": lambda: stock_cases(model, where, prompts=prompts[:2], repeats=few),
        "training": lambda: training_cases(model, where, presets=presets, batches=batches, repeats=steps),
        "cards": lambda: card_cases(model, where, presets=presets, repeats=min(steps, 2)),
        "adapters": lambda: adapter_cases(model, where, repeats=repeats),
        "serving": lambda: serving_cases(model, where),
    }
    settings = {"model": model, "weights": "random", "precision": "bfloat16 autocast"}
    report = GpuReport(_machine(where), settings, dict(known.sections) if known else {})
    if known and (known.machine, known.settings) != (report.machine, report.settings):
        raise UserError(
            f"the rows that are kept were measured on {_words(known)}, this is {_words(report)}: give another --json"
        )
    for section in sections:
        kept, rows = report.sections.get(section, []), []
        for row in measure_cases(cases[section](), kept, LIMITS_S[section]):
            rows.append(row)
            report.sections[section] = rows + [one for one in kept if one not in rows]
            after_row(report, section, row)
        report.sections[section] = rows
    return report


def _machine(device: torch.device) -> Row:
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"gpu": gpu, **versions}


def _words(report: GpuReport) -> str:
    return ", ".join(f"{name} {value}" for name, value in (report.machine | report.settings).items())


def preset_files() -> list[str]:
    """Names of the shipped presets, without the packages that a configuration needs."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_report(path: Path | None, again: Sequence[str]) -> GpuReport | None:
    """The rows that the file of an earlier call holds, but for those to measure again or still; None without a file.

    Raises:
        UserError: The file is of something else.
    """
    if path is None or not path.exists():
        return None
    if path.is_dir():
        raise UserError(f"--json takes a file, and {path} is a folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sections = {
            name: [row for row in rows if is_finished(row)]
            for name, rows in found["sections"].items()
            if name not in again
        }
        return GpuReport(found["machine"], found["settings"], sections)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no report of this benchmark: give --json another file, or remove it") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=FULL_SIZE, choices=list(CONFIGS))
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one")
    parser.add_argument("--sections", nargs="+", default=DEFAULT, choices=tuple(LIMITS_S))
    parser.add_argument("--repeats", type=int, default=12, help="calls whose median counts")
    parser.add_argument("--prompts", type=int, nargs="+", default=(1, 8, 32), help="on the image of inference")
    parser.add_argument(
        "--presets", nargs="+", default=("light", "balanced", "full", "maximum"), choices=preset_files(), metavar="NAME"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4), help="images of a training batch")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write each row to it; rows that it has are kept")
    parser.add_argument("--again", nargs="+", default=(), choices=tuple(LIMITS_S), help="sections to measure anew")
    given = parser.parse_args(argv)

    def keep(report: GpuReport, section: str, row: Row) -> None:
        words = ", ".join(f"{name} {as_text(value)}" for name, value in row.items() if value is not None)
        print(f"{section}: {words}", file=sys.stderr, flush=True)
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")

    try:
        report = measure_gpu(
            given.model,
            given.device,
            sections=given.sections,
            repeats=given.repeats,
            prompts=given.prompts,
            presets=given.presets,
            batches=given.batches,
            known=read_report(given.json, given.again),
            after_row=keep,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.text())
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
