"""Labels of pixels from the semantic output of a prompted model, measured as those of a dense head.

Shapes: `N` outputs as of a dense head, `h` `w` the size of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam3lora.config.dense import DenseSection
from sam3lora.data.images import read_annotated_image
from sam3lora.data.prompts import prompt_key
from sam3lora.data.split_files import find_split_or_whole
from sam3lora.engine.adapter_pool import AdapterPool
from sam3lora.evaluation.ask.run import RecordBatches
from sam3lora.evaluation.dense.class_counts import ClassCounts
from sam3lora.evaluation.dense.label_meter import LabelMeter
from sam3lora.evaluation.metrics.ground_truth import prompted_categories
from sam3lora.evaluation.metrics.semantic import SemanticMetrics, count_semantic
from sam3lora.model.dense.settings import DenseSettings, Mode
from sam3lora.training.dense.classes import choose_classes

_IMAGES_AT_ONCE = 4


def measure_semantic(data_dir: Path, adapter: Path | None, dense: DenseSection) -> dict[str, float | None]:
    """The metrics of `LabelMeter` on the validation images, with the classes of a dense run.

    With them `semantic_mean_iou`, that of `validate --semantic`: each category against the union of its masks, where
    `LabelMeter` of mode multiclass has one label a pixel. `adapter` of None is the base, the built-in tiny model.
    """
    index = find_split_or_whole(data_dir).read()
    classes = choose_classes(dense, index.names)
    chosen = [name for name in index.names if prompt_key(name) in classes.labels.values]
    categories = prompted_categories(index, chosen)
    prompts = [category.prompt for category in categories]
    settings = DenseSettings(  # layers and width of a head that is not there
        mode=classes.mode, classes=classes.names, threshold=dense.threshold, layers=(0,), width=1
    )
    label = None if adapter is None else "run"
    pool = AdapterPool(adapters={} if adapter is None else {"run": adapter})
    meter, counts = LabelMeter(settings, classes.labels), ClassCounts(len(categories))
    batches = RecordBatches(index, _IMAGES_AT_ONCE)
    for records in (batches[number] for number in range(len(batches))):
        images = [read_annotated_image(record) for record in records]
        found = pool.semantic_each(images, [prompts] * len(records), [label])[label]
        counts.merge(count_semantic(records, categories, found))
        for record, logits in zip(records, found, strict=True):
            meter.add(head_logits(logits, classes.mode), record)
    return meter.values() | {"semantic_mean_iou": SemanticMetrics.of(counts.total()).mean_iou}


def head_logits(logits: Sequence[np.ndarray], mode: Mode) -> np.ndarray:
    """(N, h, w) as of a dense head, from the logits (h, w) of each category.

    With one label a pixel, a pixel has the category of the largest logit, and is background where none is above 0.
    With one class of several categories it has the largest logit of them.
    """
    stacked = np.stack(logits)
    if mode == "binary":
        return stacked.max(axis=0, keepdims=True)
    if mode == "multiclass":
        return np.concatenate([np.zeros_like(stacked[:1]), stacked])
    return stacked
