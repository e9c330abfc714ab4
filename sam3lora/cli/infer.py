"""`sam3lora infer`: prompts on an image or a folder of images, or the labels of their pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sam3lora.cli import shared_options as options
from sam3lora.cli.infer_clicks import ClickOptions, adapters_by_task, infer_clicks
from sam3lora.cli.infer_dense import infer_dense, refuse_prompted
from sam3lora.cli.infer_output import (
    check_output_of_images,
    check_writable,
    print_table,
    run_with_progress,
    table_of,
)
from sam3lora.cluster import check_job_path
from sam3lora.errors import UserError

if TYPE_CHECKING:
    from sam3lora.inference.image_folder import FolderResults

Show = dict[str, bool]


def infer(
    image: Annotated[str, typer.Option(metavar="PATH", help="Image file, or a folder of images.", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option(metavar="A B ...", help="What to look for.")] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Adapter folder, such as best/; with --click of task clicks, or one of each."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Picture, or folder of pictures and labels (default: output.png, or output for folders)."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Results as JSON (default for a folder: results.json in --output).")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="With a dense adapter: a PNG of probabilities for each class.")
    ] = False,
    threshold: options.ThresholdOption = None,
    nms: options.NmsOption = None,
    nms_iou: options.NmsIouOption = None,
    merge: options.MergeOption = None,
    merge_iou: options.MergeIouOption = None,
    max_detections: options.MaxDetectionsOption = None,
    boundingbox: Annotated[
        bool | None,
        typer.Option("--boundingbox/--no-boundingbox", help="Draw boxes (default: only with --no-masks)."),
    ] = None,
    no_masks: Annotated[bool, typer.Option("--no-masks", help="No masks, neither drawn nor in the JSON.")] = False,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X0 Y0 X1 Y1", help="Pixels around an example; repeatable.")
    ] = None,
    negative_box: Annotated[
        list[str] | None, typer.Option(metavar="X0 Y0 X1 Y1", help="Pixels around what is not meant; repeatable.")
    ] = None,
    click: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y,LABEL", help="Pixel in the object (label 1) or not in it (0); repeatable."),
    ] = None,
    click_box: Annotated[
        list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Pixels around the object of the clicks.")
    ] = None,
    clicks_vision: Annotated[
        Literal["adapter", "base"] | None,
        typer.Option(help="Whose vision trunk clicks see (default: that of the adapter beside them)."),
    ] = None,
    max_hole_area: options.HoleAreaOption = None,
    max_sprinkle_area: options.SprinkleAreaOption = None,
    config: Annotated[str | None, typer.Option(help="YAML of a run: its adapter, model and thresholds.")] = None,
    model: Annotated[str | None, typer.Option(help='Base model: "tiny", a hub id or a folder.')] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.")] = None,
    device: Annotated[list[str] | None, typer.Option(metavar="0", help="GPU, or cpu.")] = None,
) -> None:
    """Find what prompts name in an image, or in every image of a folder. A dense adapter labels each pixel instead.
    Clicks correct a detection of a prompt, or without a prompt show an object of the image.

    Example:  sam3lora infer --weights outputs/balanced/best --image photo.jpg --prompt crack pothole
    """
    adapter, click_adapter = adapters_by_task(weights or [])
    given = {
        "adapter": adapter,
        "click_adapter": click_adapter,
        "model": model,
        "resolution": resolution,
    }
    given = {name: value for name, value in given.items() if value is not None} | options.post_of(locals())
    settings = _from_config(config, given) | given
    if is_dense := _is_dense(settings):
        prompted = {
            "--prompt": prompt,
            "--box": box,
            "--negative-box": negative_box,
            "--nms": nms,
            "--nms-iou": nms_iou,
            "--merge": merge,
            "--merge-iou": merge_iou,
            "--max-detections": max_detections,
            "--boundingbox": boundingbox,
            "--no-masks": no_masks,
            "--click": click,
            "--click-box": click_box,
            "--clicks-vision": clicks_vision,
            "--max-hole-area": max_hole_area,
            "--max-sprinkle-area": max_sprinkle_area,
            f"--weights {settings.get('click_adapter')}": settings.get("click_adapter"),
        }
        refuse_prompted(prompted, settings["adapter"])
    elif probabilities:
        raise UserError("--probabilities has no effect without a dense adapter: leave it out")
    boxes, not_meant = _read_boxes("--box", box), _read_boxes("--negative-box", negative_box)
    clicks = ClickOptions.read(click, click_box)
    if not clicks and settings.get("click_adapter") is not None:
        raise UserError(
            f"{settings['click_adapter']} answers clicks: add --click x,y on an object or --click-box, or leave it out"
        )
    if clicks_vision is not None and not (clicks and settings.get("adapter")):
        raise UserError("--clicks-vision has no effect without a click and an adapter of prompts: leave it out")
    areas = {"max_hole_area": max_hole_area, "max_sprinkle_area": max_sprinkle_area}
    cleaning = {name: value for name, value in areas.items() if value is not None}
    if cleaning and not clicks:
        named = ", ".join("--" + name.replace("_", "-") for name in cleaning)
        raise UserError(f"{named} would have no effect without --click or --click-box: leave it out")
    if clicks:
        examples = {"--box": box, "--negative-box": negative_box, "--no-masks": no_masks}
        post = {f"--{name.replace('_', '-')}": value for name, value in options.post_of(locals()).items()}
        clicks.check(prompt or [], examples, post)
    elif not is_dense and not prompt and not boxes:
        raise UserError(
            "nothing to look for: add --prompt crack, --box x0 y0 x1 y1 around an example, or --click x,y on an object"
        )
    options.check_merge_iou(merge_iou, _merges(settings))
    settings["device"] = _device(_only(device, "--device"))
    for option, path in {"--output": output or "output", "--json": json}.items():
        if path is not None:
            check_job_path(path, option)
    if is_dense:
        infer_dense(Path(image), output or Path("output"), json, settings, probabilities=probabilities)
        return
    show = {"show_masks": not no_masks, "show_boxes": no_masks if boundingbox is None else boundingbox}
    images = Path(image)
    if clicks:
        if images.is_dir():
            raise UserError("--click and --click-box are pixels of one image, but --image is a folder")
        infer_clicks(
            images,
            prompt[0] if prompt else None,
            clicks,
            output or Path("output.png"),
            json,
            settings,
            show_boxes=show["show_boxes"],
            clicks_vision=clicks_vision or "adapter",
            cleaning=cleaning,
        )
    elif not images.is_dir():
        labels = [1] * len(boxes) + [0] * len(not_meant)
        _infer_image(
            images, prompt or [], boxes + not_meant, labels, output or Path("output.png"), json, show, settings
        )
    elif boxes or not_meant:
        raise UserError("--box and --negative-box are pixels of one image, but --image is a folder")
    else:
        output = output or Path("output")
        _infer_folder(images, prompt or [], output, json or output / "results.json", show, settings)


def _infer_image(
    image: Path,
    prompts: Sequence[str],
    boxes: list[list[float]],
    labels: list[int],
    output: Path,
    json: Path | None,
    show: Show,
    settings: dict[str, Any],
) -> None:
    from sam3lora.data.images import read_size
    from sam3lora.inference.image_folder import FolderResults, detections_of
    from sam3lora.inference.predictor import Predictor
    from sam3lora.inference.result_pictures import check_picture_path

    read_size(image)  # no image: said before the model is loaded
    check_picture_path(output)
    for path in (output, json):
        if path is not None:
            check_writable(path, image)
    predictor = Predictor(**settings)
    started = time.perf_counter()
    results = predictor.predict(image, prompts, boxes, labels, masks=show["show_masks"])
    seconds = time.perf_counter() - started
    predictor.draw(results, output, **show)
    predictions = FolderResults({**predictor.settings, "prompts": [result.prompt for result in results]})
    predictions.add(image.name, results[0].size_hw, detections_of(results))
    if json is not None:
        predictions.write(json)
    _print_table(predictions)
    typer.echo(f"{seconds:.2f} s; picture: {output}" + (f"; detections: {json}" if json else ""))


def _infer_folder(
    folder: Path, prompts: Sequence[str], output: Path, json: Path, show: Show, settings: dict[str, Any]
) -> None:
    from sam3lora.inference.image_folder import list_images, predict_folder
    from sam3lora.inference.predictor import Predictor

    paths = list_images(folder)
    check_output_of_images(output, folder)
    for path in (output / paths[0].name, json):
        check_writable(path)
    predictor = Predictor(**settings)

    def run(on_done: Callable[[], None]) -> FolderResults:
        return predict_folder(predictor, paths, prompts, pictures_dir=output, json_path=json, on_done=on_done, **show)

    run_with_progress(
        len(paths), run, source=folder, written=f"pictures: {output}; detections", json=json, tell=_print_table
    )


def _print_table(predictions: FolderResults) -> None:
    from rich.text import Text

    settings = predictions.settings
    table = table_of(settings, "prompt", "found", "in images", "best score", "presence")
    for number, prompt in enumerate(settings["prompts"]):
        results = [image["results"][number] for image in predictions.images]
        found = sum(result["num_detections"] for result in results)
        scores = [detection["score"] for result in results for detection in result["detections"]]
        num_images = sum(result["num_detections"] > 0 for result in results)
        presence = max((result["presence"] for result in results), default=0.0)
        best = f"{max(scores):.2f}" if scores else "-"
        table.add_row(Text(prompt), str(found), f"{num_images} of {len(results)}", best, f"{presence:.2f}")
    print_table(table)
    if not any(result["num_detections"] for image in predictions.images for result in image["results"]):
        typer.echo(f"nothing scored {settings['threshold']:g} or more: try a lower --threshold")


def _is_dense(settings: dict[str, Any]) -> bool:
    if settings.get("adapter") is None:
        return False
    from sam3lora.model.adapter.metadata import is_dense_folder

    return is_dense_folder(settings["adapter"])


def _merges(settings: dict[str, Any]) -> bool:
    if settings.get("merge") is not None or settings.get("adapter") is None:
        return bool(settings.get("merge"))
    from sam3lora.model.adapter.metadata import read_metadata, recorded_post_processing

    return recorded_post_processing(read_metadata(settings["adapter"])).merge


def _from_config(source: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's configuration; an adapter that records its base model is used with that one."""
    if source is None:
        return {}
    from sam3lora.config import load_config
    from sam3lora.model.adapter.metadata import read_metadata

    config = load_config(source)
    values: dict[str, Any]
    if config.task == "dense":
        values = {"threshold": config.dense.threshold} if "threshold" in config.dense.model_fields_set else {}
    else:
        values = options.written_post(config)
    best, role = Path(config.output.output_dir) / "best", "click_adapter" if config.task == "clicks" else "adapter"
    if role not in given and best.is_dir():
        values[role] = best
    adapters = [found for name in ("adapter", "click_adapter") if (found := given.get(name) or values.get(name))]
    if not any(read_metadata(adapter) for adapter in adapters):
        values["geometry_cls"] = config.model.geometry_cls
        if "model" not in given:
            values |= {"model": config.model.name, "revision": config.model.revision}
    return values | {"resolution": config.model.resolution, "local_files_only": config.model.local_files_only}


def _read_boxes(option: str, words: Sequence[str] | None) -> list[list[float]]:
    try:
        numbers = [float(word) for word in words or ()]
    except ValueError:
        numbers = [0.0]
    if len(numbers) % 4:
        raise UserError(f"{option} takes four numbers x0 y0 x1 y1 in pixels, got {' '.join(words or ())}")
    return [numbers[start : start + 4] for start in range(0, len(numbers), 4)]


def _only(words: Sequence[Any] | None, option: str) -> Any:
    if words and len(words) > 1:
        raise UserError(f"{option} takes one value here, got {len(words)}: {' '.join(map(str, words))}")
    return words[0] if words else None


def _device(name: str | None) -> str | None:
    """As torch calls it; `0` is the first GPU."""
    if name is None:
        return None
    import torch

    device = f"cuda:{name}" if name.isdecimal() else name
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} cannot be used here: expected cpu, or one of {torch.cuda.device_count()} GPUs counted "
            "from 0"
        ) from None
    return device
