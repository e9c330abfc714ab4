"""Learning from incomplete labels: half of a drawn set's labels are removed, and the validation labels stay whole.

All objects of an image are of one category, "part", so that those without a label look like those with one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from jobs.bench.study import StudyReport, keep_run, read_runs, short_run
from sam3lora.data.coco import ANNOTATION_FILE

WORD = "part"
WAYS = {"all labels": (1.0, "true"), "half, exhaustive": (0.5, "true"), "half, not exhaustive": (0.5, "false")}
ABSENT = ("circle", "star", "square", "cat", "car")  # words that no image shows


def study_incomplete_labels(
    *, seeds: Sequence[int], num_train: int = 32, num_valid: int = 48, epochs: int = 10, results: Path | None = None
) -> StudyReport:
    """Every way with every seed, which draws images, removes labels and trains.

    Args:
        results: A file to which each run is appended; runs that it holds are not repeated.
    """
    from sam3lora.data.synth.dataset import write_dataset

    torch.set_num_threads(1)
    runs = read_runs(results)
    known = {(run["way"], run["seed"]) for run in runs}
    with TemporaryDirectory() as scratch:
        for seed in seeds:
            data = Path(scratch) / f"data{seed}"
            write_dataset(data, num_train=num_train, num_valid=num_valid, seed=seed, progress=False)
            complete = (data / "train" / ANNOTATION_FILE).read_text(encoding="utf-8")
            for way, (share, exhaustive) in WAYS.items():
                if (way, seed) not in known:
                    labels = keep_labels(json.loads(complete), share, seed)
                    (data / "train" / ANNOTATION_FILE).write_text(json.dumps(labels), encoding="utf-8")
                    run = train_and_measure(data, Path(scratch) / f"{len(runs)}", exhaustive, seed, epochs)
                    runs.append({"way": way, "seed": seed, "labels": len(labels["annotations"]), **run})
                    keep_run(results, runs[-1])
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
