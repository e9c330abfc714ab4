"""Learning from incomplete labels: half of a drawn set's labels are removed, and the validation labels stay whole.

All objects of an image are of one category, "part", so that those without a label look like those with one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.study import StudyReport, run_study, short_run
from sam3lora.data.coco import ANNOTATION_FILE

WORD = "part"
WAYS = {"all labels": (1.0, "true"), "half, exhaustive": (0.5, "true"), "half, not exhaustive": (0.5, "false")}
ABSENT = ("circle", "star", "square", "cat", "car")  # words that no image shows


def study_incomplete_labels(
    *, seeds: Sequence[int], num_train: int = 32, num_valid: int = 48, epochs: int = 10, results: Path | None = None
) -> StudyReport:
    """Train every way with every seed; `results` as in `run_study`."""
    complete_of: dict[Path, str] = {}  # as each set was drawn

    def measure(data: Path, folder: Path, seed: int, way: tuple[float, str]) -> dict[str, float]:
        share, exhaustive = way
        file = data / "train" / ANNOTATION_FILE
        complete = complete_of.setdefault(data, file.read_text(encoding="utf-8"))
        labels = keep_labels(json.loads(complete), share, seed)
        file.write_text(json.dumps(labels), encoding="utf-8")
        return {"labels": len(labels["annotations"]), **train_and_measure(data, folder, exhaustive, seed, epochs)}

    runs = run_study(WAYS, seeds, num_train, num_valid, results, measure)
    facts = {"steps": f"{epochs} epochs of {num_train} images, 4 a step", "validation images": num_valid}
    facts["negative prompts"] = ", ".join(ABSENT)
    return StudyReport(f'"{WORD}" on complete validation labels', runs, facts)


def keep_labels(content: dict[str, Any], share: float, seed: int) -> dict[str, Any]:
    """The COCO content with a random share of its annotations; images may lose all of theirs."""
    annotations = content["annotations"]
    count = round(share * len(annotations))
    kept = np.sort(np.random.default_rng(seed).permutation(len(annotations))[:count])
    return content | {"annotations": [annotations[row] for row in kept]}


def train_and_measure(data: Path, folder: Path, exhaustive: str, seed: int, epochs: int) -> dict[str, float]:
    """Train an adapter, and measure its last state on the validation images."""
    from sam3lora.evaluation.ask.run import evaluate
    from sam3lora.training.launch import train

    names = [category["name"] for category in json.loads((data / "train" / ANNOTATION_FILE).read_text())["categories"]]
    prompts = dict.fromkeys(names, WORD)
    config = short_run(
        folder,
        data,
        seed,
        f"data.prompts={json.dumps(prompts)}",
        f"data.negative_prompts={json.dumps(ABSENT)}",
        f"data.exhaustive={exhaustive}",
        f"training.num_epochs={epochs}",
    )
    adapter = train(config).last_adapter
    found = evaluate(data, adapter=adapter, device="cpu", prompts=prompts, negative_prompts=ABSENT)
    return {
        "mask mAP": found.map or 0.0,
        "mask mAP50": found.map_50 or 0.0,
        "box mAP": found.bbox_map or 0.0,
        "F1 at score 0.5": found.positive_micro_f1 or 0.0,
        "detections / objects": found.num_detections / found.num_ground_truth,
        "false alarms": found.off_prompt_fpr or 0.0,
        "presence right": found.presence_accuracy or 0.0,
    }
