"""The time that the trainer waits for data: batches read ahead by a thread, beside batches read when needed."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2

from jobs.bench.data import ANNOTATIONS, DataWork, write_photographs
from jobs.bench.processes import Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from jobs.bench.training_work import TrainingWork
from sam3lora.config import Config, load_config
from sam3lora.errors import UserError

AHEAD, NEEDED = "sam3lora, made ahead by a thread", "made when needed"


@dataclass(frozen=True)
class WaitWork:
    """Steps of a preset on one photograph each, without kept features, in one process."""

    model: str = "small"
    preset: str = "light"
    num_steps: int = 6

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"num_steps must be positive, got {self.num_steps}")


def compare_waiting(work: WaitWork | None = None, *, rounds: int = 3, num_threads: int = 1) -> BenchReport:
    """Seconds of a step and the share of them that the trainer waits; the first batch does not count.

    Args:
        work: What is trained.
        rounds: Measured; the median counts.
        num_threads: Of torch. With fewer threads than processors the thread has one to itself.

    Raises:
        UserError: A number that is not positive, or no such model.
    """
    work = work or WaitWork()
    if rounds < 1:
        raise UserError(f"rounds must be positive, got {rounds}")
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "valid"):
            (Path(folder) / split).mkdir()
        side = TrainingWork(work.preset, model=work.model).resolution
        write_photographs(Path(folder) / "train", DataWork(side, num_images=work.num_steps + 1))
        write_photographs(Path(folder) / "valid", DataWork(side, num_images=1))
        ways = {
            name: Work(make_trainer, {"folder": folder, "work": work, "ahead": name == AHEAD})
            for name in (AHEAD, NEEDED)
        }
        found = measure_in_turns(ways, rounds=rounds, num_threads=num_threads)
    waited = {name: sorted(result["waited"] for result in way.results)[len(way.results) // 2]
              for name, way in found.items()}  # fmt: skip
    return BenchReport(
        title=f"{work.num_steps} steps of the {work.preset} preset, {work.model} model, a photograph of 960 x 720 each",
        ways=[
            Timing(name, statistics.median(result["seconds"] for result in way.results)) for name, way in found.items()
        ],
        facts={
            **{f"share of a step waited, {name}": round(share, 4) for name, share in waited.items()},
            "the same losses": len({tuple(way.results[0]["losses"]) for way in found.values()}) == 1,
        },
    )


def make_trainer(folder: str, work: WaitWork, ahead: bool) -> Round:
    """A round takes the steps of one epoch; the weights stay as they are, so every round has the same losses."""
    from jobs.bench.our_training import make_runner
    from sam3lora.data.batch import Batch
    from sam3lora.data.pipeline import iterate_batches
    from sam3lora.data.plan import plan_run
    from sam3lora.training.datasets import BatchSource, load_run_data
    from sam3lora.training.step import StepCounts

    cv2.setNumThreads(1)
    training = TrainingWork(work.preset, model=work.model, dropout=0.0)
    config = _config(folder, work)
    data = load_run_data(config, training.resolution)
    model = training.adapted_model()
    runner = make_runner(training, model)

    def train() -> dict[str, object]:
        batches: Iterator[Batch]
        if ahead:
            batches = BatchSource(data, config, images_per_step=1, use_ray=False).training_batches(0, 0)
        else:
            plans = plan_run(len(data.train), images_per_step=1, num_epochs=1, seed=config.training.seed)
            batches = iterate_batches(data.train.table, plans, data.train_settings)
        next(batches)
        losses, waited, start = [], 0.0, time.perf_counter()
        for _ in range(work.num_steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            model.zero_grad(set_to_none=True)
            loss, _ = runner.backward(batch, StepCounts.of([batch]).normalizer())
            losses.append(float(loss))
        seconds = time.perf_counter() - start
        return {"waited": waited / seconds, "seconds": seconds / work.num_steps, "losses": losses}

    return train


def _config(folder: str, work: WaitWork) -> Config:
    return load_config(
        work.preset,
        [
            f"training.data_dir={folder}",
            f"data.annotation_file={ANNOTATIONS}",
            "training.batch_size=1",
            "training.gradient_accumulation_steps=1",
            "training.num_epochs=1",
            "scaling.num_workers=0",
        ],
    )
