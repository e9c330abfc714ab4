"""SAM 3 at full size on one GPU, with random weights: training and inference, their parts, memory, and the goals.

    python -m jobs.bench.gpu --json gpu.json
    python -m jobs.bench.gpu --model tiny --device cpu --repeats 1      the same program, tried without a GPU

Needs torch, transformers, PEFT, SciPy and NumPy; run-length codes need pycocotools and OpenCV and are left out without.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from jobs.bench.gpu_inference import check_attention, measure_adapters, measure_inference
from jobs.bench.gpu_timing import Row
from jobs.bench.gpu_training import PRESETS
from jobs.bench.gpu_training_rows import measure_training
from jobs.bench.models import CONFIGS
from sam3lora.errors import UserError

FULL_SIZE = "facebook/sam3"
SECTIONS = ("attention", "inference", "adapters", "training")


@dataclass
class GpuReport:
    """Rows of each section, and the goals that they meet or miss. It can be printed after each section."""

    machine: Row
    settings: Row
    sections: dict[str, list[Row]] = field(default_factory=dict)

    def goals(self) -> list[Row]:
        """Those whose figures were measured: on a GPU at full size."""
        found: list[Row] = []
        if not self.machine["gpu"] or self.settings["model"] != FULL_SIZE:
            return found
        for goal in GOALS:
            rows = [row for row in self.sections.get(goal.section, []) if goal.of.items() <= row.items()]
            values = [row[goal.figure] for row in rows if row.get(goal.figure) is not None]
            if values:
                value = max(values)
                met = value < goal.limit if goal.figure == "peak GB" else value <= goal.limit
                found.append({"goal": goal.name, "limit": goal.limit, "measured": value, "met": met})
        return found

    @property
    def failed(self) -> bool:
        """Whether a section could not be measured; memory that ran out is a result."""
        return any("failed" in row.get("note", "") for rows in self.sections.values() for row in rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "goals": self.goals()}

    def text(self) -> str:
        lines = [", ".join(f"{name}: {value}" for name, value in (self.machine | self.settings).items())]
        for name, rows in (self.sections | {"goals": self.goals()}).items():
            if rows:
                lines += ["", name, *_table(rows)]
        if not self.machine["gpu"]:
            lines += ["", "peak memory, compilation and the goals need a GPU"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Goal:
    """The largest `figure` of a section's rows that have the values `of`."""

    name: str
    section: str
    of: Row
    figure: str
    limit: float


_OURS = {"way": "sam3lora"}
GOALS = (
    Goal("light, 1 image: GB", "training", {"preset": "light", "images": 1, **_OURS}, "peak GB", 4),
    Goal("balanced r16, 1 image: GB", "training", {"preset": "balanced", "images": 1, **_OURS}, "peak GB", 8),
    Goal("maximum r32, 2 images: GB", "training", {"preset": "maximum", "images": 2, **_OURS}, "peak GB", 16),
    Goal("eager, 1 prompt: ms", "inference", {"way": "eager", "prompts": 1}, "first call ms", 100),
    Goal("compiled, 1 prompt: ms", "inference", {"way": "compiled vision, default"}, "first call ms", 60),
    Goal("same image again, share of a first call", "inference", {"way": "eager", "prompts": 1}, "again / first", 0.4),
    Goal("adapter overhead, bank: %", "adapters", {"way": "bank"}, "overhead %", 15),
)


def measure_gpu(
    model: str = FULL_SIZE,
    device: str | None = None,
    *,
    sections: Sequence[str] = SECTIONS,
    repeats: int = 20,
    prompts: Sequence[int] = (1, 8, 32),
    presets: Sequence[str] = ("light", "balanced", "full", "maximum"),
    batches: Sequence[int] = (1, 2, 4),
    after_section: Callable[[GpuReport, str], None] = lambda report, section: None,
) -> GpuReport:
    """Measure the sections; what fails in one is a row of it, and the others go on.

    Args:
        model: A configuration, filled with random weights.
        device: None takes a GPU if there is one.
        sections: Of `SECTIONS`.
        repeats: Calls whose median counts; of training steps a quarter.
        prompts: Numbers of prompts on the image of inference.
        presets: To train.
        batches: Numbers of images in a training batch.
        after_section: Gets the report so far and the name of the section.

    Raises:
        UserError: No such model or section, or a GPU is asked for and there is none.
    """
    for section in sections:
        if section not in SECTIONS:
            raise UserError(f"sections must be of {', '.join(SECTIONS)}, got {section!r}")
    if model not in CONFIGS:
        raise UserError(f"model must be one of {', '.join(CONFIGS)}, got {model!r}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here: use --device cpu, with --model tiny")
    work: dict[str, Callable[[], list[Row]]] = {
        "attention": lambda: [check_attention(model, where)],
        "inference": lambda: measure_inference(model, where, prompts=tuple(prompts), repeats=repeats),
        "adapters": lambda: measure_adapters(model, where, repeats=repeats),
        "training": lambda: measure_training(
            model, where, presets=presets, batches=batches, repeats=max(1, repeats // 4)
        ),
    }
    report = GpuReport(_machine(where), {"model": model, "weights": "random", "precision": "bfloat16 autocast"})
    for section in sections:
        try:
            report.sections[section] = work[section]()
        except Exception as error:  # an hour of the GPU is not lost to one section
            first_line = (str(error).splitlines() or [""])[0]
            report.sections[section] = [{"note": f"failed: {type(error).__name__}: {first_line}"}]
        after_section(report, section)
    return report


def _machine(device: torch.device) -> Row:
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"gpu": gpu, **versions}


def _table(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def preset_files() -> list[str]:
    """Names of the shipped presets, without the packages that a configuration needs."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=FULL_SIZE, choices=list(CONFIGS))
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--repeats", type=int, default=20, help="calls whose median counts")
    parser.add_argument("--prompts", type=int, nargs="+", default=(1, 8, 32), help="on the image of inference")
    parser.add_argument(
        "--presets", nargs="+", default=("light", "balanced", "full", "maximum"), choices=preset_files(), metavar="NAME"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4), help="images of a training batch")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was found as JSON")
    given = parser.parse_args(argv)

    def keep(report: GpuReport, section: str) -> None:
        print(f"{section}: measured", file=sys.stderr, flush=True)
        if given.json:
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
            after_section=keep,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.text())
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
