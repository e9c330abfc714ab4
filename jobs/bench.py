"""Time and memory of the work beside the plain way of doing the same, measured in one run: docs/benchmarks.md.

    python jobs/bench.py train-step --preset full      a step of training, against stock SAM 3 with PEFT
    python jobs/bench.py feature-cache                 epochs with kept features of a frozen vision trunk
    python jobs/bench.py prompts                       many prompts on one image
    python jobs/bench.py adapters                      a batch that mixes adapters
    python jobs/bench.py data                          reading training data, against a torch DataLoader
    python jobs/bench.py data-wait                     what the trainer waits for its data
    python jobs/bench.py large-set                     a data set of the size of COCO, some five minutes
    python jobs/bench.py evaluate                      a split to COCO results and mAP
    python jobs/bench.py evaluate-large                drawn results on 5,000 images x 80 categories, some ten minutes
    python jobs/bench.py postprocess                   mask logits to run-length codes
    python jobs/bench.py click-masks                   simulated clicks on a large image
    python jobs/bench.py scaling                       two workers, against two processes on their own
    python jobs/bench.py cost-model                    steps of several sizes, measured and predicted
    python jobs/bench.py serve                         requests over HTTP, some five minutes
    python jobs/bench.py serve-hops                    what HTTP adds to a request, process by process
    python jobs/bench.py serve-images                  a new image in every request, encoded ahead or not
    python jobs/bench.py start-up                      from a command to its first step or answer, split
    python jobs/bench.py serve-threads                 torch_threads of the service, quiet and busy
    python jobs/bench.py serve-faults                  what clients see when its processes die, some four minutes
    python jobs/bench.py drill                         training runs that are disturbed: docs/reliability.md
    python jobs/bench.py recipes                       two training recipes at equal processor seconds, half an hour
    python jobs/bench.py launches                      kernels of an inference and of a training step, counted
    python jobs/bench.py gpu                           SAM 3 at full size on one GPU, less than six minutes
    python jobs/bench.py memory                        what smaller GPUs can train, counted without one
    python jobs/bench.py incomplete-labels             learning with half of the labels, some ten minutes
    python jobs/bench.py rejected-word                 learning a word that the base firmly rejects, some five minutes

Each prints the ratio of the times, `launches` the counts, the last two what was learned; `--json PATH` keeps what was
found. With nothing else on the machine.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

# The working directory of a job holds the source, but Python looks only beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from jobs.bench.launches import LaunchReport
    from jobs.bench.memory import MemoryReport
    from jobs.bench.recipes import RecipeReport
    from jobs.bench.report import BenchReport
    from jobs.bench.serving_report import ServingReport
    from jobs.bench.study import StudyReport

NUMBER = re.compile(r"^\d+$")
LIST_OPTIONS = {"--clients": NUMBER, "--adapters": NUMBER, "--threads": NUMBER}

app = typer.Typer(help="Benchmarks beside the plain way.", no_args_is_help=True, add_completion=False)
JsonPath = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", dir_okay=False, help="Write what was found as JSON.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")]
Model = Annotated[Literal["tiny", "small"], typer.Option(help="Configuration, with random weights.")]
Prompts = Annotated[int, typer.Option("--prompts", min=1, help="Prompts on each image.")]
Results = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="A file to which every run is appended; those that it holds are not repeated."),
]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16 = bfloat16 autocast, all ways alike.")]


@app.command("train-step")
def train_step(
    preset: Annotated[str, typer.Option(help="Of the configuration: what is adapted and how ours trains.")] = "full",
    num_prompts: Prompts = 4,
    images: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 1,
    repeats: Repeats = 3,
    model: Model = "small",
    precision: Precision = "fp32",
    variants: Annotated[
        bool, typer.Option("--variants", help="Other checkpointing and smaller chunks as well.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """A step of training without kept features, against stock SAM 3 with PEFT."""
    from jobs.bench.training import compare_train_step

    report = compare_train_step(
        preset,
        model=model,
        num_prompts=num_prompts,
        num_images=images,
        precision=precision,
        rounds=repeats,
        variants=variants,
    )
    _show([report], json_path)


@app.command("feature-cache")
def feature_cache(
    preset: Annotated[str, typer.Option(help="One that leaves the vision trunk as it is.")] = "light",
    images: Annotated[int, typer.Option(min=1, help="Images of an epoch.")] = 8,
    num_prompts: Prompts = 4,
    epochs: Annotated[int, typer.Option(min=2, help="The first fills the cache.")] = 3,
    model: Model = "small",
    precision: Precision = "fp32",
    json_path: JsonPath = None,
) -> None:
    """Epochs of training with a frozen vision trunk, whose outputs are kept, against stock SAM 3 with PEFT."""
    from jobs.bench.feature_cache import compare_feature_cache

    reports = compare_feature_cache(
        preset=preset, model=model, num_images=images, num_prompts=num_prompts, epochs=epochs, precision=precision
    )
    _show(reports, json_path)


@app.command()
def prompts(
    num_prompts: Prompts = 8,
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
    from jobs.bench.prompts import compare_prompts, compare_repeated

    reports = [
        compare(model, num_prompts=num_prompts, repeats=repeats, device=device)
        for compare in (compare_prompts, compare_repeated)
    ]
    _show(reports, json_path)


@app.command()
def postprocess(
    masks: Annotated[int, typer.Option(min=2, help="Number of masks.")] = 200,
    kept: Annotated[int, typer.Option(min=1, help="Masks that reach the threshold.")] = 30,
    mask_side: Annotated[int, typer.Option(min=2, help="Side of the logits.")] = 288,
    height: Annotated[int, typer.Option(min=1, help="Of the image in pixels.")] = 2000,
    width: Annotated[int, typer.Option(min=1, help="Of the image in pixels.")] = 3000,
    repeats: Repeats = 1,
    json_path: JsonPath = None,
) -> None:
    """Suppression and run-length codes without enlarged masks, against enlarging all of them (1.6 GB, two minutes)."""
    # Each way is measured in a new process, which reads this file again: nothing heavy is imported above.
    from jobs.bench.postprocess import Workload, compare_postprocessing

    workloads = [
        Workload(kind, masks, mask_side, (height, width), num_kept)
        for num_kept in (kept, None)
        for kind in ("blobs", "large")
    ]
    _show([compare_postprocessing(workload, repeats=repeats) for workload in workloads], json_path)


@app.command("click-masks")
def click_masks(
    megapixels: Annotated[float, typer.Option(min=0.01, max=178, help="Of the image.")] = 20,
    objects: Annotated[int, typer.Option(min=1, help="Objects of the image.")] = 12,
    clicks: Annotated[int, typer.Option(min=1, help="On each object.")] = 3,
    repeats: Repeats = 1,
    json_path: JsonPath = None,
) -> None:
    """Simulated clicks on masks as run-length codes, against arrays of the image's size; some 15 s."""
    from jobs.bench.click_masks import ClickWorkload, compare_click_masks

    _show([compare_click_masks(ClickWorkload(megapixels, objects, clicks), repeats=repeats)], json_path)


@app.command()
def adapters(
    requests: Annotated[int, typer.Option(min=4, help="Asked together.")] = 8,
    every_case: Annotated[bool, typer.Option("--every-case", help="Four cases instead of two.")] = False,
    repeats: Repeats = 2,
    model: Model = "small",
    json_path: JsonPath = None,
) -> None:
    """Requests over four adapters in one batch, against one adapter, and against PEFT one request at a time."""
    from jobs.bench.adapters import compare_adapters

    _show(compare_adapters(model, num_requests=requests, repeats=repeats, every_case=every_case), json_path)


@app.command()
def data(
    images: Annotated[int, typer.Option(min=1, help="Photographs of 960 x 720.")] = 64,
    repeats: Repeats = 3,
    ray: Annotated[bool, typer.Option(help="Also read by a task of Ray Data.")] = True,
    json_path: JsonPath = None,
) -> None:
    """Images to training batches, against a torch DataLoader, at 336 and 1008 pixels."""
    from jobs.bench.data import compare_data

    _show(compare_data(num_images=images, rounds=repeats, use_ray=ray), json_path)


@app.command("data-wait")
def data_wait(
    steps: Annotated[int, typer.Option(min=1, help="In a round.")] = 6,
    repeats: Repeats = 3,
    json_path: JsonPath = None,
) -> None:
    """The share of a step that the trainer waits for its data, with and without reading ahead."""
    from jobs.bench.data_wait import WaitWork, compare_waiting

    reports = [compare_waiting(WaitWork(model, num_steps=steps), rounds=repeats) for model in ("tiny", "small")]
    _show(reports, json_path)


@app.command("large-set")
def large_set(
    share: Annotated[float, typer.Option(min=0, help="Of COCO's 118,000 images.")] = 1.0,
    folder: Annotated[
        Path | None, typer.Option(help="Where the drawn set stays (default: a temporary folder).")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Index, check, plan and first batch of a drawn data set of COCO's size, against pycocotools."""
    from jobs.bench.large_data import compare_large_data

    _show(compare_large_data(share, folder=folder), json_path)


@app.command()
def evaluate(
    images: Annotated[int, typer.Option(min=1, help="Synthetic scenes.")] = 2,
    num_prompts: Prompts = 4,
    repeats: Repeats = 2,
    model: Model = "small",
    json_path: JsonPath = None,
) -> None:
    """Images and prompts to COCO results and mAP, against a stock forward for each pair."""
    from jobs.bench.evaluation import compare_evaluation

    _show([compare_evaluation(model, num_images=images, num_prompts=num_prompts, repeats=repeats)], json_path)


@app.command("evaluate-large")
def evaluate_large(
    images: Annotated[int, typer.Option(min=1, help="Of 640 x 480.")] = 5_000,
    categories: Annotated[int, typer.Option(min=3, help="Asked of every image.")] = 80,
    present: Annotated[int, typer.Option(min=1, help="Detections of a category that the image shows.")] = 100,
    absent: Annotated[
        float, typer.Option(min=0, help="Of one that it lacks, on average; 100 = without a floor.")
    ] = 1.0,
    plain: Annotated[bool, typer.Option(help="pycocotools and hotcoco on everything, too.")] = True,
    json_path: JsonPath = None,
) -> None:
    """Matching and measuring drawn results, against pycocotools and hotcoco on all of them at once."""
    from jobs.bench.large_split import DrawnSplit, compare_large_split

    split = DrawnSplit(images, categories, (present, absent))
    _show([compare_large_split(split, plain=plain)], json_path)


@app.command()
def scaling(
    preset: Annotated[str, typer.Option(help="Of the configuration.")] = "light",
    num_prompts: Prompts = 4,
    steps: Annotated[int, typer.Option(min=1, help="Of one image, in a round.")] = 2,
    repeats: Repeats = 3,
    model: Model = "small",
    json_path: JsonPath = None,
) -> None:
    """Two one-thread workers, against two processes on their own; what the exchange among up to sixteen costs."""
    from jobs.bench.scaling import ScalingWork, compare_scaling

    work = ScalingWork(preset, model, num_prompts, steps)
    _show([compare_scaling(work, rounds=repeats)], json_path)


@app.command("cost-model")
def cost_model(
    preset: Annotated[str, typer.Option(help="Of the configuration.")] = "light",
    repeats: Repeats = 3,
    model: Model = "small",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Steps of several sizes: as measured, and as docs/cost_model.md predicts them."""
    from jobs.bench.cost_model import compare_prediction
    from sam3lora.config import load_config

    load_config(preset)  # one that does not exist is told before any process starts
    _show([compare_prediction(preset, model=model, rounds=repeats, num_threads=threads)], json_path)


@app.command()
def recipes(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe on each set.")] = 3,
    images: Annotated[int, typer.Option(min=8, help="Training images of a set.")] = 24,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Images to measure on.")] = 64,
    results: Results = None,
    json_path: JsonPath = None,
) -> None:
    """The former recipe of the presets and the present one, on three drawn sets: mAP on held-out images."""
    from jobs.bench.recipes import compare_recipes

    numbers = range(1, seeds + 1)
    _show([compare_recipes(seeds=numbers, num_train=images, num_test=held_out, results=results)], json_path)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def gpu(context: typer.Context) -> None:
    """SAM 3 at full size on one GPU; python -m jobs.bench.gpu is the same with little installed."""
    from jobs.bench.gpu import main

    raise typer.Exit(main(context.args))


@app.command()
def memory(
    presets: Annotated[list[str] | None, typer.Argument(help="Names (default: all for the full-size model).")] = None,
    model: Annotated[Literal["tiny", "small", "facebook/sam3"], typer.Option(help="Configuration.")] = "facebook/sam3",
    json_path: JsonPath = None,
) -> None:
    """Peak memory of a training step, and what GPUs of 8, 12, 16 and 24 GB can train: counted, without a GPU."""
    from jobs.bench.memory import PRESETS, count_memory

    _show([count_memory(presets or PRESETS, model=model)], json_path)


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
    from jobs.bench.serving import compare_serving
    from jobs.bench.serving_work import ServingPlan

    # The servers are stopped on the way out, which SIGTERM alone would not take.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = ServingPlan(model, clients or (1, 8, 32), adapters or (1, 4, 16), seconds, images, repeated, haproxy)
    _show([compare_serving(plan)], json_path)


@app.command("serve-hops")
def serve_hops(
    requests: Annotated[int, typer.Option(min=1, help="Of each way to start the service.")] = 300,
    json_path: JsonPath = None,
) -> None:
    """What HTTP adds to the model's work for one client, with nothing, Ray Serve or HAProxy in front."""
    from jobs.bench.serving_hops import measure_hops

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _show([measure_hops(requests=requests)], json_path)


@app.command("serve-images")
def serve_images(
    model: Annotated[Literal["tiny", "small"], typer.Option(help="The built-in one, or random weights.")] = "tiny",
    clients: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of clients (default: 1 8 32).")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of each measurement.")] = 5.0,
    repeats: Repeats = 3,
    json_path: JsonPath = None,
) -> None:
    """A new image in every request: with and without encoding ahead, beside the plain server."""
    from jobs.bench.serving_images import measure_new_images

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = measure_new_images(model=model, clients=clients or (1, 8, 32), seconds=seconds, repeats=repeats)
    _show([report], json_path)


@app.command("start-up")
def start_up(repeats: Repeats = 3, json_path: JsonPath = None) -> None:
    """From `sam3lora train` to its first step, and from `sam3lora serve` to its first answer, split by what is done."""
    from jobs.bench.start_up import measure_start_up

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _show([measure_start_up(repeats=repeats)], json_path)


@app.command("serve-threads")
def serve_threads(
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of threads (default: 1 to the cores).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of each measurement.")] = 10.0,
    json_path: JsonPath = None,
) -> None:
    """`torch_threads` of `sam3lora serve`, with and without other work on the machine."""
    import os

    from jobs.bench.serving_threads import measure_threads

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _show([measure_threads(threads or range(1, (os.cpu_count() or 1) + 1), seconds=seconds)], json_path)


@app.command("serve-faults")
def serve_faults(
    clients: Annotated[int, typer.Option(min=1, help="Of either kind.")] = 4, json_path: JsonPath = None
) -> None:
    """Kill the processes of `sam3lora serve` one by one, and restart it, under load."""
    from jobs.bench.serving_faults import measure_faults

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _show([measure_faults(clients=clients)], json_path)


@app.command()
def drill(
    names: Annotated[list[str] | None, typer.Argument(help="Of drills (default: all).", show_default=False)] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder in which the runs stay.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Disturb training runs of the tiny model, one fault at a time, and compare them with undisturbed ones."""
    from jobs.bench.drill.table import FAILED, run_drills

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = run_drills(names or (), keep=keep)
    _show([report], json_path)
    if any(row["status"] == FAILED for row in report.tables[0].rows):
        raise typer.Exit(1)


@app.command()
def launches(json_path: JsonPath = None) -> None:
    """Kernels that a GPU would start, counted part by part without one, and the bytes that the mask loss moves."""
    from jobs.bench.launches import count_launches

    _show([count_launches()], json_path)


Seeds = Annotated[int, typer.Option(min=1, help="Runs of each way.")]


@app.command("incomplete-labels")
def incomplete_labels(
    seeds: Seeds = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Over 32 drawn images.")] = 10,
    results: Results = None,
    json_path: JsonPath = None,
) -> None:
    """All labels of a drawn set, and half of them with data.exhaustive true and false: mAP on complete labels."""
    from jobs.bench.incomplete_labels import study_incomplete_labels

    _show([study_incomplete_labels(seeds=range(1, seeds + 1), epochs=epochs, results=results)], json_path)


@app.command("rejected-word")
def rejected_word(
    seeds: Seeds = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Over 24 drawn images.")] = 8,
    results: Results = None,
    json_path: JsonPath = None,
) -> None:
    """Presence of a word that the base is sure not to see, before and after training, with and without a limit."""
    from jobs.bench.rejected_word import study_rejected_word

    _show([study_rejected_word(seeds=range(1, seeds + 1), epochs=epochs, results=results)], json_path)


def _show(
    reports: Sequence[BenchReport | LaunchReport | MemoryReport | RecipeReport | ServingReport | StudyReport],
    json_path: Path | None,
) -> None:
    from rich.console import Console

    for report in reports:
        report.print(Console())
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        found = [report.to_dict() for report in reports]
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def run() -> int:
    from sam3lora.cli.argv import normalize_argv
    from sam3lora.errors import UserError

    try:
        app(args=normalize_argv(sys.argv[1:], LIST_OPTIONS), prog_name="jobs/bench.py")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
