"""The cost model of `docs/cost_model.md` beside measured steps: some settings give its numbers, others try them."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jobs.bench.processes import Round, Work, measure_in_turns
from jobs.bench.report import BenchReport, Timing
from jobs.bench.scaling import make_step
from jobs.bench.training_work import TrainingWork
from sam3lora.errors import UserError


class Setting(NamedTuple):
    """Images of a step and prompts on each."""

    images: int
    prompts: int

    def __str__(self) -> str:
        return f"{self.images} x {self.prompts}"


FITTED = (Setting(1, 1), Setting(1, 4), Setting(2, 2))
TRIED = (Setting(1, 2), Setting(2, 1), Setting(2, 4), Setting(1, 8))


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: `fixed` + images x (`vision` + prompts x `detector`)."""

    fixed: float
    vision: float
    detector: float

    def __call__(self, setting: Setting) -> float:
        return self.fixed + setting.images * (self.vision + setting.prompts * self.detector)

    @classmethod
    def fit(cls, measured: dict[Setting, float]) -> StepCost:
        """Least squares.

        Raises:
            ValueError: The settings do not tell the three numbers apart.
        """
        rows = np.array([[1.0, setting.images, setting.images * setting.prompts] for setting in measured])
        if np.linalg.matrix_rank(rows) < 3:
            raise ValueError(f"three settings must differ in images and prompts, got {[*map(str, measured)]}")
        found, *_ = np.linalg.lstsq(rows, np.array([*measured.values()]), rcond=None)
        return cls(*(float(value) for value in found))


def compare_prediction(
    preset: str = "light",
    *,
    model: str = "small",
    rounds: int = 3,
    tried: Sequence[Setting] = TRIED,
    num_threads: int | None = None,
) -> BenchReport:
    """Steps without kept features, in one process: those that the model is fitted to, and those that it predicts.

    Args:
        preset: Of the configuration.
        model: A configuration, filled with random weights.
        rounds: Measured; the median counts.
        tried: Settings to predict.
        num_threads: Of torch; None for its own number.

    Raises:
        UserError: Rounds that are not positive, or no such model.
    """
    if rounds < 1:
        raise UserError(f"rounds must be positive, got {rounds}")
    settings = list(dict.fromkeys((*FITTED, *tried)))
    work = TrainingWork(preset, model=model, dropout=0.0)
    way = Work(make_steps, {"work": work, "settings": settings})
    [measured] = measure_in_turns({"steps": way}, rounds=rounds, num_threads=num_threads).values()
    seconds = {
        setting: float(np.median([result[number] for result in measured.results]))
        for number, setting in enumerate(settings)
    }
    cost = StepCost.fit({setting: seconds[setting] for setting in FITTED})
    return BenchReport(
        title=f"Steps of the {preset} preset, {model} model: images x prompts on each",
        ways=[Timing(f"{setting}{' (fitted)' if setting in FITTED else ''}", seconds[setting]) for setting in settings],
        facts={
            "a step, s": round(cost.fixed, 4),
            "vision, s an image": round(cost.vision, 4),
            "detector, s a prompt on an image": round(cost.detector, 4),
            **{
                f"predicted / measured, {setting}": round(cost(setting) / seconds[setting], 3)
                for setting in settings
                if setting not in FITTED
            },
        },
    )


def make_steps(work: TrainingWork, settings: Sequence[Setting]) -> Round:
    """A round takes a step of each setting and returns their seconds."""
    model = work.adapted_model()
    works = [replace(work, num_images=setting.images, num_prompts=setting.prompts) for setting in settings]
    steps = [make_step(work, model, one.batch()) for one in works]

    def run() -> list[float]:
        found = []
        for step in steps:
            gc.collect()
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return found

    return run
