"""Find prompts in a large number of images, or label their pixels, on a Ray cluster or on this machine.

    python jobs/predict.py --input images --prompt crack pothole --weights outputs/run/best --output outputs/labels
    python jobs/predict.py --input images --weights outputs/dense/best --output outputs/labels
    ray job submit --working-dir . -- python jobs/predict.py --input /shared/images --prompt crack \
        --weights /shared/run/best --output /shared/labels

The same command continues where an interrupted one stopped. docs/batch_inference.md describes the output.
The exit status is 0 on success (bad images are listed), 2 on a mistake in the options, 1 on any other failure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

# The working directory of a job holds the source, but Python looks only beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam3lora.cli import shared_options as options
from sam3lora.cli.argv import normalize_argv, refuse_bad_paths
from sam3lora.cli.shared_options import choose_gpus, gpu_indices
from sam3lora.errors import RunFailed, UserError


def main(
    source: Annotated[
        str, typer.Option("--input", metavar="PATH", help="Folder, list of paths (.txt) or COCO file (.json).")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results.")],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="A B ...", help="What to look for; nothing with a dense adapter.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Adapter folder; the base model without it.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model; that of the adapter without it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.")] = None,
    threshold: options.ThresholdOption = None,
    nms: options.NmsOption = None,
    nms_iou: options.NmsIouOption = None,
    merge: options.MergeOption = None,
    merge_iou: options.MergeIouOption = None,
    max_detections: options.MaxDetectionsOption = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Model replicas; one for each GPU without it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one vision pass.")] = 4,
    device: Annotated[list[str] | None, typer.Option(metavar="0 1 ...", help="GPUs of this machine, or cpu.")] = None,
    overlays: Annotated[bool, typer.Option("--overlays", help="Draw the results into OUTPUT/overlays.")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="With a dense adapter: a PNG of probabilities for each class.")
    ] = False,
    dataset: Annotated[bool, typer.Option(help="Write OUTPUT/dataset, to train on.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite/--resume", help="Start again, or continue.")] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster; a local Ray otherwise.")] = None,
) -> None:
    """Find prompts in every image of a folder, a list or a COCO file, or label its pixels with a dense adapter.

    The same command continues where an earlier run stopped."""
    use_gpu = None
    if device:
        use_gpu = bool(gpu_indices(device))
        if use_gpu:
            choose_gpus(device, address)

    from sam3lora.inference.batch.job import ModelChoice, predict_batch

    try:
        summary = predict_batch(
            source,
            output,
            prompt or [],
            choice=ModelChoice(model, weights, revision, resolution),
            post=options.post_of(locals()),
            num_workers=num_workers,
            batch_size=batch_size,
            use_gpu=use_gpu,
            overlays=overlays,
            probabilities=probabilities,
            dataset=dataset,
            overwrite=overwrite,
            address=address,
        )
    except KeyboardInterrupt:
        print(f"interrupted: what is finished is kept in {output}, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    print(summary.in_words())


def run() -> int:
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(main)
        refuse_bad_paths(sys.argv[1:])
        app(args=normalize_argv(sys.argv[1:]), prog_name="jobs/predict.py")
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
