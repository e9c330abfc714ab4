"""`sam3lora export`: merge an adapter into its base model, copy it, or upload it to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam3lora.cluster import check_job_path
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.model.publish.export import ExportReport
    from sam3lora.model.publish.hub import Upload


def export(
    weights: Annotated[list[Path], typer.Option(help="Adapter folder, such as best/ of a run.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge it into its base model, for plain transformers.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder to write; --merge needs one.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model (default: the adapter's own).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of merged weights: float32 (default) or bfloat16.")] = None,
    push_to: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload to the Hugging Face hub.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what --push-to would upload; no network.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see the uploaded files.")] = False,
) -> None:
    """Check an adapter, then merge it, copy it or upload it (private unless --public).

    Example:  sam3lora export --weights outputs/balanced/best --merge --output outputs/merged
    """
    if len(weights) != 1:
        raise UserError(f"--weights takes one folder here, got {len(weights)}: export them one by one")
    if merge and output is None:
        raise UserError("--merge needs a folder to write the merged model to: add --output DIR")
    if not merge and (model or dtype):
        raise UserError("--model and --dtype are options of a merge: add --merge or leave them out")
    if push_to is None and (dry_run or public):
        raise UserError("--dry-run and --public are options of an upload: add --push-to USER/NAME or leave them out")
    if output is not None:
        check_job_path(output, "--output")

    from transformers.utils.logging import disable_progress_bar

    from sam3lora.model.publish.export import copy_adapter, merge_adapter
    from sam3lora.model.publish.hub import check_folder, check_repo_id, push_adapter

    disable_progress_bar()  # shards are written in a moment
    if push_to is not None:
        check_repo_id(push_to)
    folder = weights[0]
    if merge and output is not None:
        report = merge_adapter(folder, output, model=model, dtype=dtype or "float32")
        folder = report.folder
        _print_merge(report)
    else:
        files = check_folder(folder)
        typer.echo(f"{folder} is complete: {', '.join(f'{file.name} {_size(file.stat().st_size)}' for file in files)}")
        if output is not None:
            folder = copy_adapter(folder, output)
            typer.echo(f"copied to {folder}")
    if push_to is not None:
        _print_upload(push_adapter(folder, push_to, private=not public, dry_run=dry_run))
    _print_usage(folder)


def _print_merge(report: ExportReport) -> None:
    typer.echo(
        f"merged {report.num_modules} modules into {report.base_model} at {report.resolution} pixels: {report.folder}, "
        f"{_size(report.size_mb * 1e6)} in {report.dtype}"
    )
    typer.echo(f"largest differences of {report.check}:")
    for name, item in report.differences.items():
        typer.echo(f"  {name:<9} {item.absolute:.1e}  ({item.relative:.1e} of the largest value, {item.scale:.3g})")


def _print_upload(upload: Upload) -> None:
    kind = "private" if upload.private else "public"
    if upload.url is not None:
        typer.echo(f"uploaded {len(upload.files)} files to {upload.url}")
        return
    typer.echo(f"dry run: {len(upload.files)} files would go to {upload.repo_id}, {kind}")
    for name, size in upload.files.items():
        typer.echo(f"  {_size(size):>10}  {name}")
    typer.echo("its model card begins:")
    typer.echo("".join(f"  | {line}\n" for line in upload.card_head.splitlines()))


def _print_usage(folder: Path) -> None:
    from sam3lora.model.adapter.metadata import DENSE, read_metadata
    from sam3lora.model.publish.hub import is_merged_folder

    metadata = read_metadata(folder)
    if metadata and metadata.task == DENSE:
        lines = [
            "from sam3lora import Predictor",
            f'predictor = Predictor("{metadata.base_model or "BASE_MODEL"}", adapter="{folder}")',
            'result = predictor.predict_dense("image.jpg")',
        ]
    elif is_merged_folder(folder):
        lines = [
            "from transformers import Sam3Model, Sam3Processor",
            f'model = Sam3Model.from_pretrained("{folder}", dtype="float32").eval()',
            f'processor = Sam3Processor.from_pretrained("{folder}")  # see README.md there',
        ]
    else:
        base = metadata.base_model if metadata else None
        prompt = metadata.prompts[0] if metadata and metadata.prompts else "crack"
        lines = [
            "from sam3lora import Predictor",
            f'predictor = Predictor("{base or "BASE_MODEL"}", adapter="{folder}")',
            f'results = predictor.predict("image.jpg", prompts=["{prompt}"])',
        ]
    typer.echo("use it:")
    typer.echo("\n".join(f"  {line}" for line in lines))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"
