"""Results that were written earlier, or by another program, judged without asking a model."""

from __future__ import annotations

import time
from pathlib import Path

from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco_results import read_results
from sam3lora.data.fault_report import fault_summary, split_faults
from sam3lora.data.prompts import prompt_key
from sam3lora.data.split_files import SplitFiles
from sam3lora.evaluation.ask.run import asked_categories, read_split
from sam3lora.evaluation.metrics.ground_truth import SplitTruth
from sam3lora.evaluation.metrics.measure import SplitMetrics, measure_split
from sam3lora.evaluation.settings import EvaluationSettings
from sam3lora.evaluation.skipped_images import SkippedImages
from sam3lora.evaluation.split_results import SplitResults


def evaluate_predictions(
    file: str | Path, split: SplitFiles | Path, settings: EvaluationSettings, *, progress: bool = False
) -> SplitMetrics:
    """Measure a COCO results file on a split, as it is: nothing is suppressed or merged.

    With `settings.on_bad_image` "skip", images that are seen ahead to be unreadable have no part in it.

    Args:
        file: JSON list of image_id, category_id, segmentation (RLE or polygons), score, and optionally bbox (xywh).
        split: Images and labels, whose ids the results use, or their folder.
        progress: Print the faults of both files.

    Raises:
        UserError: The file is missing, truncated or no COCO results, belongs to another split, or nothing in it can be
            read.
    """
    started = time.perf_counter()
    source = Path(file)
    split, index, faults = read_split(split, settings, tell=progress)
    skipped = SkippedImages(index, settings.num_samples)
    # The results need no pixels, but those of an evaluation that skipped images have nothing of them.
    measured = skipped.look_ahead("skip") if settings.on_bad_image == "skip" else index.first(settings.num_samples)
    asked = asked_categories(measured, settings)
    found = read_results(source, index, {category.id for category in asked})
    faults_of_results = split_faults(source.name, found.faults, labels="results")
    if progress and faults_of_results:
        print(fault_summary(faults_of_results, source, "results"), flush=True)
    if settings.categories is None:  # a program may have asked for categories that no label has
        in_results = {result["category_id"] for result in found.results}
        unused = [name for number, name in index.listed_names.items() if number in in_results]
        asked = asked_categories(measured, settings, unused)
    truth = SplitTruth(measured, asked)
    images = set(truth.image_ids)
    # Categories that share a prompt share an id.
    ids = {category.id: category.id for category in asked}
    id_of_name = {key: category.id for category in asked for key in category.name_keys}
    ids |= {
        number: id_of_name[prompt_key(name)]
        for number, name in index.listed_names.items()
        if prompt_key(name) in id_of_name
    }
    results = SplitResults()
    results.predictions = [
        result | {"category_id": ids[result["category_id"]]}
        for result in found.results
        if result["image_id"] in images and result["category_id"] in ids
    ]
    results.num_before_nms = len(results.predictions)
    return measure_split(
        truth,
        results,
        label=source.stem,
        post=settings.post_processing(PostProcessing()),
        exhaustive=settings.exhaustive,
        negative_prompts=settings.negative_prompts,
        settings={"data": str(split), "predictions": str(source)},
        split_dir=split.image_dir,
        seconds=time.perf_counter() - started,
        faults=[*skipped.faults(split.title, faults), *faults_of_results],
        skipped_images=skipped.listed(),
    )
