"""Time and memory of inference beside the plain way of doing the same work, measured in one run.

    python jobs/bench.py prompts --prompts 8 --repeats 3        many prompts on one image
    python jobs/bench.py prompts --model facebook/sam3          its configuration, with random weights
    python jobs/bench.py postprocess                            mask logits to run-length codes at 4000 x 3000
    python jobs/bench.py serve --clients 1 8 32                 requests over HTTP, some five minutes

Prints the ratio of the times; `--json PATH` keeps what was found. Runs on a GPU if there is one.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

# The working directory of a job holds the source, but Python looks only beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from sam3lora.bench.report import Comparison
    from sam3lora.bench.serving_report import ServingReport

app = typer.Typer(help="Benchmarks of inference and serving.", no_args_is_help=True, add_completion=False)
JsonPath = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write what was found as JSON.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; the fastest counts.")]


@app.command()
def prompts(
    num_prompts: Annotated[int, typer.Option("--prompts", min=1, help="Prompts on the image.")] = 8,
    repeats: Repeats = 3,
    model: Annotated[
        Literal["tiny", "small", "facebook/sam3"] | None,
        typer.Option(
            help="Configuration, with random weights; the last on a GPU and small elsewhere, if none is named."
        ),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="A GPU if there is one.")] = None,
    json_path: JsonPath = None,
) -> None:
    """One vision pass for all prompts, against the whole model for each."""
    from sam3lora.bench.prompts import compare_prompts

    _tell([compare_prompts(model, num_prompts=num_prompts, repeats=repeats, device=device)], json_path)


@app.command()
def postprocess(
    masks: Annotated[int, typer.Option(min=2, help="Number of masks.")] = 200,
    mask_side: Annotated[int, typer.Option(min=2, help="Side of the logits.")] = 288,
    height: Annotated[int, typer.Option(min=1, help="Of the image in pixels.")] = 3000,
    width: Annotated[int, typer.Option(min=1, help="Of the image in pixels.")] = 4000,
    repeats: Repeats = 1,
    json_path: JsonPath = None,
) -> None:
    """Suppression and run-length codes without enlarged masks, against enlarging all of them (2.5 GB, a minute)."""
    # Each way is measured in a new process, which reads this file again: nothing heavy is imported above.
    from sam3lora.bench.postprocess import Workload, compare_postprocessing

    workloads = [Workload(kind, masks, mask_side, (height, width)) for kind in ("blobs", "large")]
    _tell([compare_postprocessing(workload, repeats=repeats) for workload in workloads], json_path)


@app.command()
def serve(
    model: Annotated[Literal["tiny", "small"], typer.Option(help="The built-in one, or random weights.")] = "tiny",
    clients: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of clients (default: 1 8 32).")] = None,
    adapters: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of adapters (default: 1 4 16).")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of each measurement.")] = 5.0,
    images: Annotated[
        Literal["same", "different", "pool"], typer.Option(help="One image, a new one each time, or a pool in turns.")
    ] = "pool",
    repeated: Annotated[bool, typer.Option(help="A repeated image on the small model as well.")] = True,
    haproxy: Annotated[bool, typer.Option("--haproxy", help="Start `sam3lora serve` with it.")] = False,
    json_path: JsonPath = None,
) -> None:
    """`sam3lora serve` beside FastAPI around stock transformers and PEFT, asked the same in turns."""
    from sam3lora.bench.serving import compare_serving
    from sam3lora.bench.serving_work import ServingPlan

    # The servers are stopped on the way out, which SIGTERM alone would not take.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = ServingPlan(model, clients or (1, 8, 32), adapters or (1, 4, 16), seconds, images, repeated, haproxy)
    _tell([compare_serving(plan)], json_path)


def _tell(reports: Sequence[Comparison | ServingReport], json_path: Path | None) -> None:
    from rich.console import Console

    for report in reports:
        report.print(Console())
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        found = [report.to_dict() for report in reports]
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _one_word_each(argv: Sequence[str]) -> list[str]:
    """`--clients 1 8` as `--clients 1 --clients 8`, which the parser wants."""
    words: list[str] = []
    option = ""
    for word in argv:
        if word.startswith("-"):
            option = word
        elif option in ("--clients", "--adapters") and words[-1] != option:
            words.append(option)
        words.append(word)
    return words


def run() -> int:
    from sam3lora.errors import UserError

    try:
        app(args=_one_word_each(sys.argv[1:]), prog_name="jobs/bench.py")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
