"""`sam3lora validate`: the numbers of a base model or of adapters, and a report to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sam3lora.cli import evaluation_options as options
from sam3lora.cli import shared_options as shared
from sam3lora.cli.click_evaluation import (
    adapters_of_clicks,
    click_settings,
    refuse_beside_clicks,
    refuse_without_clicks,
    validate_clicks,
)
from sam3lora.cli.dense_evaluation import dense_folders, dense_measurement, refuse_prompt_options, validate_dense
from sam3lora.cli.shared_options import check_output_folder
from sam3lora.errors import UserError

MOST = 10**6


def validate(
    weights: options.WeightsOption = None,
    val_data_dir: options.DataOption = None,
    use_base_model: Annotated[
        bool, typer.Option("--use-base-model", help="Measure the base model (too, if adapters are named).")
    ] = False,
    config: options.ConfigOption = None,
    split: options.SplitOption = "valid",
    threshold: shared.ThresholdOption = None,
    nms: shared.NmsOption = None,
    nms_iou: shared.NmsIouOption = None,
    merge: shared.MergeOption = None,
    merge_iou: shared.MergeIouOption = None,
    max_detections: shared.MaxDetectionsOption = None,
    lowest_score: options.LowestScoreOption = None,
    num_samples: options.SamplesOption = None,
    model: options.ModelOption = None,
    resolution: options.ResolutionOption = None,
    device: options.DeviceOption = None,
    num_workers: options.WorkersOption = None,
    batch_size: options.BatchOption = None,
    on_bad_image: options.OnBadImageOption = None,
    address: options.AddressOption = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure COCO results from a file instead of asking a model.")
    ] = None,
    saco: Annotated[
        list[Path] | None,
        typer.Option("--saco", metavar="FILE ...", help="Ground truth in SA-Co layout, a file for each annotator."),
    ] = None,
    save_threshold: Annotated[
        Literal["overall", "per-prompt"] | None,
        typer.Option(help="Write the threshold of the best cgF1 into the adapters, which use it from then on."),
    ] = None,
    semantic: options.SemanticOption = False,
    paper_normalisation: Annotated[
        bool,
        typer.Option(
            "--paper-normalisation",
            help="Of binary dense folders: stretch each image's probabilities to [0, 1] first, as many papers do.",
        ),
    ] = False,
    clicks: Annotated[
        bool,
        typer.Option("--clicks", help="Measure clicks on objects instead: how many they take, and how good masks are."),
    ] = False,
    start_from: Annotated[
        Literal["mask", "box", "both", "none"] | None,
        typer.Option(
            help="With --clicks: what of a detection goes with the first click; none asks no prompts (default: both)."
        ),
    ] = None,
    clicks_vision: Annotated[
        Literal["adapter", "base"] | None,
        typer.Option(help="With --clicks: whose vision trunk the click head sees (default: adapter)."),
    ] = None,
    max_clicks: Annotated[
        int | None, typer.Option(min=1, help="With --clicks: most clicks on an object (default: 20, as in papers).")
    ] = None,
    max_hole_area: shared.HoleAreaOption = None,
    max_sprinkle_area: shared.SprinkleAreaOption = None,
    output: options.OutputOption = Path("outputs/validate"),
) -> None:
    """Measure adapters or the base model: metrics.json, predictions.json and report.html.

    A folder of task dense is measured pixel by pixel, and leaves label maps as PNG in predictions/. With --clicks a
    simulated user clicks on each labelled object, with and without a prompt before; without --weights under the base.

    Example:  sam3lora validate --weights outputs/run/best --val-data-dir datasets/potholes
    """
    check_output_folder(output, "--output")
    if predictions is not None:
        what_makes_them = {
            "--weights": weights,
            "--use-base-model": use_base_model,
            "--model": model,
            "--resolution": resolution,
            "--nms": nms,
            "--nms-iou": nms_iou,
            "--merge": merge,
            "--merge-iou": merge_iou,
            "--max-detections": max_detections,
            "--lowest-score": lowest_score,
            "--save-threshold": save_threshold,
            "--semantic": semantic,
            "--clicks": clicks,
        }
        if idle := [option for option, value in what_makes_them.items() if value]:
            raise UserError(
                f"results from --predictions are measured as they are, so {', '.join(idle)} would have no effect: "
                "leave one or the other out"
            )
    settings_file = options.read_config(config)
    if clicks:
        post = shared.post_of(locals())
        refuse_beside_clicks(locals(), post)
        named = options.adapter_folders(weights, settings_file) if weights or not use_base_model else {}
        adapters, click_adapter = adapters_of_clicks(named, use_base_model, clicks_vision)
        prompting = options.settings_of(
            adapters,
            settings_file,
            post,
            num_samples=num_samples,
            batch_size=batch_size,
            on_bad_image=on_bad_image,
        )
        validate_clicks(
            options.named_split(val_data_dir, split, settings_file),
            options.models_of(
                adapters, settings_file, with_base=not adapters, model=model, resolution=resolution, device=device
            ),
            output,
            click_settings(prompting, locals()),
            click_adapter=click_adapter,
            num_workers=num_workers,
            address=address,
        )
        return
    refuse_without_clicks(locals())
    if dense := dense_folders(named := options.adapter_folders(weights, settings_file)):
        refuse_prompt_options(locals())
        if len(named) > 1:
            raise UserError(
                f"{dense[0]} is of task dense: measure such folders one at a time, or with sam3lora compare"
            )
        validate_dense(dense[0], output, dense_measurement(locals(), settings_file))
        return
    if paper_normalisation:
        raise UserError("--paper-normalisation is for folders of task dense: leave it out")
    if saco and predictions is not None:
        from sam3lora.evaluation.report.saving import save_saco

        save_saco({predictions.stem: predictions}, saco, output)
        return
    if save_threshold and (saco or (use_base_model and not weights)):
        raise UserError("--save-threshold writes into adapters: name them with --weights DIR, without --saco")
    if saco and val_data_dir is None:
        raise UserError(
            "--saco needs results to judge (--predictions FILE), or the folder of its images to ask a model of "
            "(--val-data-dir DIR)"
        )
    ask_adapters = predictions is None and (weights or not use_base_model)
    adapters = options.adapter_folders(weights, settings_file) if ask_adapters else {}
    if not adapters and not use_base_model and predictions is None:
        raise UserError("nothing to measure: name adapters with --weights DIR, or add --use-base-model")
    if saco and semantic:
        raise UserError("--saco has no labels of whole images to measure the semantic output on: leave out --semantic")
    if saco:  # the benchmark keeps overlapping detections, and all of them
        nms = "none" if nms is None and nms_iou is None else nms
        max_detections = MOST if max_detections is None else max_detections
    settings = options.settings_of(
        adapters,
        settings_file,
        shared.post_of(locals()),
        lowest_score=options.lowest_score_of(lowest_score),
        num_samples=num_samples,
        batch_size=batch_size,
        on_bad_image=on_bad_image,
        semantic=semantic or None,
    )
    from sam3lora.evaluation.report.saving import save_validation

    if predictions is not None:
        from sam3lora.evaluation.ask.predictions_file import evaluate_predictions

        images = options.named_split(val_data_dir, split, settings_file)
        save_validation([evaluate_predictions(predictions, images, settings, progress=True)], output)
        return
    from sam3lora.evaluation.ask.run import evaluate_models

    models = options.models_of(
        adapters, settings_file, with_base=use_base_model, model=model, resolution=resolution, device=device
    )
    if saco and val_data_dir is not None:
        from sam3lora.evaluation.ask.saco_phrases import ask_saco
        from sam3lora.evaluation.report.saving import save_saco, write_results

        asked = ask_saco(
            saco[0], val_data_dir, models, settings, num_workers=num_workers, address=address, progress=True
        )
        save_saco(write_results(asked.by_label, output), saco, output, asked.image_ids, asked.skipped)
        return
    images = options.named_split(val_data_dir, split, settings_file)
    results = evaluate_models(images, models, settings, num_workers=num_workers, address=address, progress=True)
    save_validation(results, output)
    if save_threshold:
        from sam3lora.evaluation.report.saving import record_best_threshold

        for metrics in results:
            if metrics.label in adapters:
                typer.echo(
                    record_best_threshold(metrics, adapters[metrics.label], per_prompt=save_threshold == "per-prompt")
                )
