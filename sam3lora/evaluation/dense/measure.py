"""`DenseMetrics`: all numbers of one dense model on one split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sam3lora.data.coco import CocoIndex
from sam3lora.data.fault_report import SplitFault, fault_lines
from sam3lora.data.label_maps import LabelMaps
from sam3lora.evaluation.dense.map_files import MapFolder
from sam3lora.evaluation.dense.saliency import MEASURES
from sam3lora.evaluation.dense.split_meter import DenseMeter
from sam3lora.evaluation.metrics.bootstrap import ValueInterval, bootstrap_value, bootstrap_values
from sam3lora.model.adapter.metadata import DENSE
from sam3lora.model.dense.settings import DenseSettings

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class DenseClassMetrics:
    """Metrics of one class over all pixels of the set in [0, 1], None where it does not occur.

    `pixels` is their number in the truth.
    """

    iou: float | None
    precision: float | None
    recall: float | None
    pixels: int
    boundary_iou: float | None


@dataclass(frozen=True)
class DenseMetrics:
    """Metrics of a dense model on a split, None where nothing can be measured (`notes` say why).

    Attributes:
        label: Name of the model.
        values: Each measure over all images, in [0, 1].
        per_class: Class name -> its metrics, the background first where it is a class of the model.
        intervals: Name of a measure, or iou/CLASS -> 95 % interval from resampling the images.
        num_empty_images: Images without a pixel of any class.
        empty_with_foreground: Share of these that got a pixel of a class.
        skipped_images: Those that could not be read, which have no part in any number.
        meter: What all was computed from.
        model, labels, index, predictions: For pictures: the model's settings, the values of the categories, the images,
            and the predicted label maps if they were kept.
    """

    label: str
    num_images: int
    values: dict[str, float | None]
    per_class: dict[str, DenseClassMetrics]
    intervals: dict[str, ValueInterval]
    num_empty_images: int
    empty_with_foreground: float | None
    settings: dict[str, Any]
    notes: list[str]
    meter: DenseMeter = field(repr=False)
    model: DenseSettings = field(repr=False)
    labels: LabelMaps = field(repr=False)
    index: CocoIndex = field(repr=False)
    predictions: MapFolder | None = None
    seconds: float = 0.0
    faults: Sequence[SplitFault] = ()
    skipped_images: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The metrics as JSON values; `confusion` counts pixels by true class (row) and predicted class."""
        values: dict[str, Any] = {
            "label": self.label,
            "task": DENSE,
            "mode": self.model.mode,
            "num_images": self.num_images,
            **self.values,
            "num_empty_images": self.num_empty_images,
            "empty_with_foreground": self.empty_with_foreground,
            "per_class": {name: asdict(entry) for name, entry in self.per_class.items()},
            "intervals": {
                name: {"low": one.low, "high": one.high} for name, one in self.intervals.items() if one.low is not None
            },
            "settings": self.settings,
            "seconds": self.seconds,
            "skipped_images": list(self.skipped_images),
            "notes": [*fault_lines(self.faults), *self.notes],
        }
        if len(self.meter.matrices) == 1:
            (matrix,) = self.meter.matrices
            values["confusion"] = {"classes": matrix.class_names, "pixels": matrix.matrix_NN.tolist()}
        return values


def measure_dense(
    meter: DenseMeter,
    model: DenseSettings,
    index: CocoIndex,
    *,
    label: str,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
    predictions: MapFolder | None = None,
    seconds: float = 0.0,
    faults: Sequence[SplitFault] = (),
    skipped_images: Sequence[Mapping[str, Any]] = (),
    num_resamples: int = NUM_RESAMPLES,
) -> DenseMetrics:
    """Compute all metrics from what was counted; `notes` come before those of the measuring, the rest is stored."""
    labels = {name: entry for matrix in meter.matrices for name, entry in matrix.values().per_class.items()}
    near = {name: iou for boundary in meter.boundaries for name, iou in boundary.values().per_class.items()}
    per_class = {name: DenseClassMetrics(**vars(labels[name]), boundary_iou=near[name]) for name in meter.class_names}
    num_empty, num_alarms = meter.empty_images()
    num_images = len(meter.image_ids)
    intervals = bootstrap_values(meter.label_metrics(), num_images, num_resamples=num_resamples)
    if meter.saliency is not None:
        rows = meter.saliency.rows()
        for name in MEASURES:
            intervals[name] = bootstrap_value(rows.metric(name), len(rows.image_ids), num_resamples=num_resamples)
    return DenseMetrics(
        label=label,
        num_images=num_images,
        values=meter.values(),
        per_class=per_class,
        intervals=intervals,
        num_empty_images=num_empty,
        empty_with_foreground=num_alarms / num_empty if num_empty else None,
        settings=dict(settings),
        notes=[*notes, *dict.fromkeys(meter.notes())],
        meter=meter,
        model=model,
        labels=meter.labels.labels,
        index=index,
        predictions=predictions,
        seconds=seconds,
        faults=faults,
        skipped_images=skipped_images,
    )
