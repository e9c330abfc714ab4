"""Learning a word that the base firmly rejects: presence before and after, by the slope of the logits beyond +-10.

The built-in tiny model's presence logits are moderate, so a copy of it is made surer of itself: the last layer of its
presence head is multiplied. Its answers stay the same, yes for yes and no for no, with the logits farther from zero.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from jobs.bench.study import StudyReport, run_study, short_run

WORD = "bolt"
FACTOR = 4.0
WAYS = {"limited": 0.0, "a tenth of the slope (ours)": 0.1, "raw (SAM 3)": 1.0}


def study_rejected_word(
    *, seeds: Sequence[int], num_train: int = 24, num_valid: int = 32, epochs: int = 8, results: Path | None = None
) -> StudyReport:
    """Train every way with every seed; `results` as in `run_study`."""
    with TemporaryDirectory() as scratch:
        base = surer_base(Path(scratch) / "base", FACTOR)

        def measure(data: Path, folder: Path, seed: int, slope: float) -> dict[str, float]:
            return train_and_measure(base, data, folder, seed, epochs, slope)

        runs = run_study(WAYS, seeds, num_train, num_valid, results, measure)
    facts = {"base": f"tiny, the last layer of its presence head times {FACTOR:g}", "word": WORD}
    facts["steps"] = f"{epochs} epochs of {num_train} images, 4 a step"
    facts["measured on"] = f"{num_valid} held-out images; presence logits before any limit, means over images"
    return StudyReport(f'presence of "{WORD}"', runs, facts)


def surer_base(folder: Path, factor: float) -> Path:
    """A copy of the tiny model whose presence logits are multiplied by `factor`."""
    from safetensors.torch import load_file, save_file

    from sam3lora.model.base_folder import find_base

    shutil.copytree(find_base("tiny").path, folder)
    [file] = folder.glob("*.safetensors")
    weights = load_file(file)
    last = [name for name in weights if "presence_head.layer3." in name]
    assert last, "the presence head has another layout"
    save_file({name: value * factor if name in last else value for name, value in weights.items()}, file)
    return folder


def train_and_measure(base: Path, data: Path, folder: Path, seed: int, epochs: int, slope: float) -> dict[str, float]:
    """Presence logits on held-out images before and after training, and the adapter's mAP there.

    `slope` is that of the presence logits beyond their limits, in training.
    """
    from sam3lora.evaluation.ask.run import evaluate
    from sam3lora.model.staged import stage_outputs
    from sam3lora.training.trainer import Trainer

    config = short_run(
        folder,
        data,
        seed,
        f"model.name={base}",
        f"data.categories=[{WORD}]",
        "data.valid_split=valid",
        "evaluation.base_loss=false",
        f"training.num_epochs={epochs}",
    )
    folder.mkdir(parents=True)
    trainer = Trainer(config, folder, use_ray=False)
    before = mean_presence(trainer)
    with mock.patch.object(stage_outputs, "SLOPE_BEYOND_LIMITS", slope):
        trainer.run()
    after = mean_presence(trainer)
    found = evaluate(data, adapter=folder / "last", device="cpu", categories=(WORD,))
    return {
        "shown, before": before[0],
        "shown, after": after[0],
        "absent, before": before[1],
        "absent, after": after[1],
        "presence right": found.presence_accuracy or 0.0,
        "mask mAP": found.map or 0.0,
    }


@torch.no_grad()
def mean_presence(trainer: Any) -> tuple[float, float]:
    """Mean presence logit of the last layer, over validation images that show the word and over those that do not."""
    runner, logits, shown = trainer.runner, [], []
    trainer.model.eval()
    for batch in trainer.batches.validation_batches():
        vision = runner.images.of_batch(batch)
        text, text_index = runner.text.features(batch.prompts_B)
        found = runner.staged.detect(vision, text, torch.from_numpy(batch.query_image_B), text_index)
        logits.append(found.raw_presence_logits_LB[-1].float())
        shown.append(torch.from_numpy(batch.num_B) > 0)
    logits_B, shown_B = torch.cat(logits), torch.cat(shown)
    return _mean(logits_B[shown_B]), _mean(logits_B[~shown_B])


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
