"""Measuring drawn results on a large split: matched batch by batch, against pycocotools and hotcoco on everything."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jobs.bench.processes import Measured, Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from sam3lora.config.post_processing import PostProcessing
from sam3lora.data.coco import CocoIndex
from sam3lora.data.label_table import SCHEMA
from sam3lora.evaluation.metrics.ground_truth import PromptedCategory, SplitTruth, annotations_of_record
from sam3lora.evaluation.metrics.measure import measure_matches
from sam3lora.evaluation.predictions import Predictions, encode_results
from sam3lora.evaluation.report.validation_page import render_validation_report
from sam3lora.evaluation.split_matches import Matcher, SplitMatches
from sam3lora.evaluation.split_results import SplitResults

DRAWING, WORKER, DRIVER = "drawing alone, part of all but the driver", "sam3lora, worker", "sam3lora, driver"
PLAIN = ("pycocotools on everything", "hotcoco on everything")

_SIZE_HW = (480, 640)
_NUM_SHAPES = 500
_IMAGES_AT_ONCE = 4


@dataclass(frozen=True)
class DrawnSplit:
    """COCO's numbers: about three categories and seven objects in an image of 640 x 480.

    Attributes:
        num_found: Detections of a category that the image shows, and of one that it lacks, on average: as many as the
            model has object queries (up to 100) without a floor for scores, and few for an absent one with it.
    """

    num_images: int = 5_000
    num_categories: int = 80
    num_found: tuple[int, float] = (100, 1.0)

    @property
    def categories(self) -> list[PromptedCategory]:
        names = [f"thing {number}" for number in range(self.num_categories)]
        return [PromptedCategory(number + 1, name, name, {name}) for number, name in enumerate(names)]

    def draw(self, image_id: int) -> tuple[dict[str, Any], SplitResults]:
        """A record of an index, and a model's results for it; the same ones every time."""
        rng = np.random.default_rng(image_id)
        shapes = _shapes()
        record: dict[str, Any] = {"image_id": image_id, "file_name": f"{image_id}.jpg", "path": f"{image_id}.jpg"}
        record |= {"height": _SIZE_HW[0], "width": _SIZE_HW[1], "annotations": []}
        results = SplitResults(num_before_nms=0)
        shown = set((rng.choice(self.num_categories, 3, replace=False) + 1).tolist())
        for category_id in range(1, self.num_categories + 1):
            results.presence[image_id, category_id] = float(rng.random())
            num = self.num_found[0] if category_id in shown else int(rng.poisson(self.num_found[1]))
            places = rng.integers(0, _NUM_SHAPES, num).tolist()
            scores = (0.001 + rng.exponential(0.02, num)).clip(max=1).astype(np.float32).tolist()
            if category_id in shown:
                for row, place in enumerate(rng.integers(0, _NUM_SHAPES, rng.integers(1, 5)).tolist()):
                    known = {"category_id": category_id, "category": f"thing {category_id - 1}", "iscrowd": False}
                    region = {"bbox_xywh": shapes[place]["bbox"], "segmentation": shapes[place]["text"]}
                    record["annotations"].append({"id": len(record["annotations"]) + 1, **known, **region})
                    if row < num:  # the shape, or a neighbour that it overlaps
                        places[row] = (place + int(rng.integers(0, 3))) % _NUM_SHAPES
                        scores[row] = float(np.float32(rng.beta(4, 3)))
            for place, score in zip(places, scores, strict=True):
                shape = {"segmentation": shapes[place]["segmentation"], "bbox": shapes[place]["bbox"]}
                results.predictions.append({"image_id": image_id, "category_id": category_id, **shape, "score": score})
        results.num_before_nms = len(results.predictions)
        return record, results

    def batches(self) -> Iterator[tuple[list[dict[str, Any]], SplitResults]]:
        for start in range(0, self.num_images, _IMAGES_AT_ONCE):
            drawn = [self.draw(image_id) for image_id in range(start, min(start + _IMAGES_AT_ONCE, self.num_images))]
            together = SplitResults()
            for _, results in drawn:
                together.predictions += results.predictions
                together.presence |= results.presence
                together.num_before_nms += results.num_before_nms
            yield [record for record, _ in drawn], together


@functools.cache
def _shapes() -> list[dict[str, Any]]:
    """Ellipses; those that follow each other overlap, so that their IoU spreads over the thresholds."""
    rng = np.random.default_rng(0)
    height, width = _SIZE_HW
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    shapes = []
    for number in range(_NUM_SHAPES):
        if number % 10 == 0:
            side = float(rng.choice([8, 25, 60, 130]))
            x, y = rng.uniform(side, width - side), rng.uniform(side, height - side)
        x, y = x + rng.normal(0, side / 12), y + rng.normal(0, side / 12)
        outline = np.column_stack([x + side * np.cos(angle), y + 0.8 * side * np.sin(angle)]).clip(0, [width, height])
        polygon = outline.round(1).ravel().tolist()
        rle = coco_mask.merge(coco_mask.frPyObjects([polygon], height, width))
        segmentation = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
        box = coco_mask.toBbox(rle).tolist()
        shapes.append({"segmentation": segmentation, "bbox": box, "text": json.dumps([polygon])})
    return shapes


def compare_large_split(split: DrawnSplit, *, plain: bool = True) -> BenchReport:
    """Time and memory of matching on a worker, of measuring on the driver, and of the usual way, on the same input.

    The worker's results lie in a file between the two, as Ray would carry them. The usual way holds all results and
    evaluates masks and boxes. Everything is drawn again in each way, which `DRAWING` times.
    """
    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as name:
        parts = Path(name) / "parts"
        making: list[tuple[str, Callable[..., Round], dict[str, Any]]] = [
            (WORKER, make_worker, {"parts": parts}),
            (DRIVER, make_driver, {"parts": parts}),
        ]
        making += [(DRAWING, make_drawing, {}), (PLAIN[0], make_pycocotools, {}), (PLAIN[1], make_hotcoco, {})]
        ways = {
            way: Work(with_cpu_time, {"make": make, "split": split, **more})
            for way, make, more in making
            if plain or way not in PLAIN
        }
        found = measure_in_turns(ways, rounds=1, warm_ups=0)
    return BenchReport(
        f"{split.num_images} images x {split.num_categories} categories, "
        f"{split.num_found[0]} detections of a category that is there, {split.num_found[1]:g} of one that is not",
        [Timing(way, measured.median, measured.extra_mib) for way, measured in found.items()],
        _facts(found),
    )


def with_cpu_time(make: Callable[..., Round], **arguments: Any) -> Round:
    """Other work on the machine makes a round longer, and hardly changes the time of the processor."""
    run = make(**arguments)

    def timed() -> dict[str, Any]:
        started = time.process_time()
        return {**run(), "cpu": round(time.process_time() - started, 1)}

    return timed


def make_worker(split: DrawnSplit, parts: Path) -> Round:
    def match() -> dict[str, Any]:
        matcher = Matcher(split.categories, PostProcessing())
        num_results = 0
        with parts.open("wb") as file:
            for records, results in split.batches():
                encoded = encode_results(results.predictions, [record["image_id"] for record in records])
                pickle.dump((matcher.match(records, results), encoded), file)
                num_results += len(results.predictions)
        return {"detections": num_results, "sent to the driver, MiB": round(parts.stat().st_size / 2**20)}

    return match


def make_driver(split: DrawnSplit, parts: Path) -> Round:
    """What `sam3lora validate` does with the workers' results, with `predictions.json` and the report."""

    def measure() -> dict[str, Any]:
        rows = [{"image_id": number, "annotations": []} for number in range(split.num_images)]
        index = CocoIndex(pa.Table.from_pylist(rows, schema=SCHEMA), {c.id: c.name for c in split.categories})
        truth, predictions = SplitTruth(index, split.categories), Predictions(range(split.num_images))
        matches = []
        with parts.open("rb") as file, contextlib.suppress(EOFError):
            while True:
                part, encoded = pickle.load(file)  # noqa: S301
                matches.append(part)
                predictions.add(encoded)
        joined = SplitMatches.join(matches, truth.image_ids, split.num_categories)
        del matches
        found = measure_matches(truth, joined, Matcher(split.categories, PostProcessing()), predictions=predictions)
        written = parts.with_name("predictions.json")
        predictions.write(written)
        page = render_validation_report([found])
        return {
            "map": found.map,
            "bbox_map": found.bbox_map,
            "predictions.json, MiB": round(written.stat().st_size / 2**20),
            "report.html, MiB": round(len(page) / 2**20, 2),
        }

    return measure


def make_drawing(split: DrawnSplit) -> Round:
    def draw() -> dict[str, Any]:
        return {"detections": sum(len(results.predictions) for _, results in split.batches())}

    return draw


def make_pycocotools(split: DrawnSplit) -> Round:
    def evaluate() -> dict[str, Any]:
        truth, results = _everything(split)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            found = {}
            for name, iou_type, key in (("map", "segm", "segmentation"), ("bbox_map", "bbox", "bbox")):
                keys = ("image_id", "category_id", "score", key)  # with both, areas would be those of boxes
                evaluation = COCOeval(coco, coco.loadRes([{k: one[k] for k in keys} for one in results]), iou_type)
                evaluation.evaluate()
                evaluation.accumulate()
                found[name] = _mean(evaluation.eval["precision"])
        return found

    return evaluate


def make_hotcoco(split: DrawnSplit) -> Round:
    def evaluate() -> dict[str, Any]:
        truth, results = _everything(split)
        coco = hotcoco.COCO(truth)
        found = {}
        for name, iou_type, key in (("map", "segm", "segmentation"), ("bbox_map", "bbox", "bbox")):
            keys = ("image_id", "category_id", "score", key)
            evaluation = hotcoco.COCOeval(coco, coco.load_res([{k: one[k] for k in keys} for one in results]), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            assert evaluation.eval is not None
            found[name] = _mean(evaluation.eval["precision"])
        return found

    return evaluate


def _everything(split: DrawnSplit) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    categories = split.categories
    truth: dict[str, Any] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": category.id, "name": category.name} for category in categories]
    results = []
    for records, of_batch in split.batches():
        results += of_batch.predictions
        for record in records:
            truth["images"].append({"id": record["image_id"], "height": _SIZE_HW[0], "width": _SIZE_HW[1]})
            for annotation in annotations_of_record(record, categories):
                truth["annotations"].append(annotation | {"id": len(truth["annotations"]) + 1})
    return truth, results


def _mean(precision_TRCAM: np.ndarray) -> float:
    """mAP: at most 100 detections, all sizes."""
    chosen = precision_TRCAM[:, :, :, 0, -1]
    return float(chosen[chosen > -1].mean())


def _facts(found: Mapping[str, Measured]) -> dict[str, Any]:
    values = {way: dict(measured.results[-1]) for way, measured in found.items()}
    cpu = {way: f"{value.pop('cpu'):.1f}" for way, value in values.items()}
    averages = [(value["map"], value["bbox_map"]) for value in values.values() if "map" in value]
    facts = {
        f"mAP and box mAP, {way}": f"{value['map']:.12f}, {value['bbox_map']:.12f}"
        for way, value in values.items()
        if "map" in value
    }
    if len(averages) > 1:
        facts["largest difference"] = f"{np.ptp(averages, axis=0).max():.1e}"
    shown = {name: value for of_way in values.values() for name, value in of_way.items() if "map" not in name}
    peaks = {way: f"{measured.peak_mib:.0f}" for way, measured in found.items() if measured.peak_mib is not None}
    return facts | shown | {"seconds of the processor": cpu, "peak of the process, MiB": peaks}
