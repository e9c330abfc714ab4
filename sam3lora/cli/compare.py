"""`sam3lora compare`: is an adapter better than the base, on the same images?"""

from __future__ import annotations

from pathlib import Path

from sam3lora.cli import evaluation_options as options
from sam3lora.cli import shared_options as shared
from sam3lora.cli.dense_evaluation import compare_dense, dense_folders, dense_measurement, refuse_prompt_options
from sam3lora.cli.shared_options import check_output_folder
from sam3lora.errors import UserError


def compare(
    weights: options.WeightsOption = None,
    val_data_dir: options.DataOption = None,
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
    semantic: options.SemanticOption = False,
    output: options.OutputOption = Path("outputs/compare"),
) -> None:
    """Base against adapters: differences with intervals, and pictures (labels green, base blue, adapter red).

    Folders of task dense are compared with the first of them.

    Example:  sam3lora compare --weights outputs/run/best --val-data-dir datasets/potholes
    """
    check_output_folder(output, "--output")
    settings_file = options.read_config(config)
    adapters = options.adapter_folders(weights, settings_file)
    if not adapters:
        raise UserError("nothing to compare with the base: name adapters with --weights DIR")
    if dense := dense_folders(adapters):
        refuse_prompt_options(locals())
        if len(dense) < len(adapters):
            raise UserError(f"{dense[0]} is of task dense, and others are not: compare folders of one task")
        compare_dense(adapters, output, dense_measurement(locals(), settings_file))
        return
    images = options.named_split(val_data_dir, split, settings_file)
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
    from sam3lora.evaluation.ask.run import evaluate_models
    from sam3lora.evaluation.report.saving import compare_and_save

    models = options.models_of(
        adapters, settings_file, with_base=True, model=model, resolution=resolution, device=device
    )
    base, *others = evaluate_models(images, models, settings, num_workers=num_workers, address=address, progress=True)
    compare_and_save(base, others, output)
