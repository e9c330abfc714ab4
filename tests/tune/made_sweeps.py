"""Made-up sweeps, whose best trial and important settings are known, and what their report says."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from sam3lora.config import load_config
from sam3lora.tune.report.sweep_page import render_sweep
from sam3lora.tune.run.ledger import Rejection, TrialRecord, best_record
from sam3lora.tune.space.parameters import parse_parameter
from sam3lora.tune.space.search_space import Constraints, EarlyStopping, Failures, Search, SearchSpace

from ..evaluation.report_cases import check_page

PARAMETERS: dict[str, dict[str, Any]] = {
    "lora.rank": {"choice": [4, 8, 16, 32]},
    "lora.alpha": {"tied": "2 * lora.rank"},
    "training.learning_rate": {"loguniform": [2e-5, 1e-3]},
    "lora.dropout": {"uniform": [0.0, 0.2]},
    "lora.target_modules": {"choice": {"attention": ["q_proj", "v_proj"], "all": ["q_proj", "v_proj", "fc1", "fc2"]}},
    "components": {"choice": ["decoder", "vision + mask decoder", "everything but text"]},
}
START = 1_700_000_000.0


def make_space(metric: str = "map", parameters: dict[str, dict[str, Any]] | None = None, **search: Any) -> SearchSpace:
    parsed = {key: parse_parameter(key, written) for key, written in (parameters or PARAMETERS).items()}
    return SearchSpace(
        name="made up",
        base=load_config("light"),
        base_name="light",
        parameters=parsed,
        component_sets={},
        constraints=Constraints(max_trainable_parameters=10_000_000),
        search=Search(metric=metric, **search),
        early_stopping=EarlyStopping(),
        failures=Failures(),
    )


def trial(number: int, value: float | None = None, size: int = 1000, **values: Any) -> TrialRecord:
    """A finished trial; ``values`` with ``__`` for dots."""
    settings = {key.replace("__", "."): entry for key, entry in values.items()}
    return TrialRecord(number, settings, number == 0, size, "finished", value, best_epoch=1, epochs=1)


def draw_trials(space: SearchSpace, count: int, *, seed: int = 0, epochs: int = 10) -> list[TrialRecord]:
    """Trials of `PARAMETERS` in which the learning rate matters most, then the rank; a third is stopped, a few fail."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        values = _base_values() if number == 0 else _drawn(space, rng)
        values["lora.alpha"] = 2 * values["lora.rank"]
        records.append(_trained(space, number, values, rng, epochs))
    if count > 6:
        records[4] = replace(
            records[4], status="failed", value=None, metrics={}, history=[], epochs=0, best_epoch=None,
            failure="loss not finite", reason="the loss of step 37 is nan: lower training.learning_rate",
        )  # fmt: skip
        records[5].retries = [{"reason": "out of memory", "batch_size": 1, "gradient_accumulation_steps": 8}]
    return records


def fail(records: list[TrialRecord], reason: str = "CUDA out of memory: tried to allocate 2 GiB") -> list[TrialRecord]:
    """The same trials, all of them failed."""
    return [
        replace(
            record, status="failed", value=None, metrics={}, history=[], failure="out of memory", reason=reason,
            retries=[{"reason": "out of memory", "batch_size": 1, "gradient_accumulation_steps": 8}],
        )
        for record in records
    ]  # fmt: skip


def draw_rejections(space: SearchSpace, count: int) -> list[Rejection]:
    rng = random.Random(9)
    return [
        Rejection(number, _drawn(space, rng), "over budget", "12,345,678 parameters, at most 10,000,000", 12_345_678)
        for number in range(count)
    ]


def summarise_sweep(space: SearchSpace, records: list[TrialRecord], **changes: Any) -> dict[str, Any]:
    """What `render_sweep` is given beside the records."""
    best = best_record(records, space.search.mode)
    base = next((record.number for record in records if record.is_base), None)
    return {
        "name": space.name,
        "sweep_dir": "/data/outputs/made up",
        "metric": space.search.metric,
        "mode": space.search.mode,
        "algorithm": space.search.algorithm,
        "num_trials": len(records),
        "sessions": [
            {"started_at": START, "ended_at": START + 1500},
            {"started_at": START + 90_000, "ended_at": START + 98_000},
        ],
        "best": best.number if best else None,
        "base": base,
        "max_concurrent": 2,
        "versions": {"torch": "2.9", "ray": "2.60"},
        "held_out": None,
        "vision": {"passes": 320, "images": 320},
        **changes,
    }


def _base_values() -> dict[str, Any]:
    return {
        "lora.rank": 16,
        "training.learning_rate": 5e-5,
        "lora.dropout": 0.1,
        "lora.target_modules": ["q_proj", "v_proj"],
        "components": "decoder",
    }


def _drawn(space: SearchSpace, rng: random.Random) -> dict[str, Any]:
    return {
        "lora.rank": rng.choice([4, 8, 16, 32]),
        "training.learning_rate": float(f"{2e-5 * 50 ** rng.random():.3g}"),
        "lora.dropout": round(0.2 * rng.random(), 3),
        "lora.target_modules": rng.choice(space.parameters["lora.target_modules"].values),
        "components": rng.choice(space.parameters["components"].values),
    }


def _trained(space: SearchSpace, number: int, values: dict[str, Any], rng: random.Random, epochs: int) -> TrialRecord:
    quality = 0.55 - 0.25 * abs(math.log10(values["training.learning_rate"] / 3e-4))
    quality += 0.02 * math.log2(values["lora.rank"] / 4) + rng.gauss(0, 0.015)
    stopped = number > 0 and quality < 0.42
    ran = 3 if stopped else epochs
    key = space.search.metric
    history = []
    started = START + 130 * number if number < 10 else START + 90_000 + 130 * (number - 10)
    for epoch in range(1, ran + 1):
        score = max(0.0, quality * (1 - math.exp(-epoch / 3)) + rng.gauss(0, 0.006))
        value = 3 - 3 * score if key == "valid_loss" else score
        history.append({"epoch": epoch, "time": started + 12 * epoch, "train_loss": 3 - 3 * score, key: value})
    pick = min if space.search.mode == "min" else max
    best = pick(history, key=lambda entry: entry[key])
    return TrialRecord(
        number=number,
        values=values,
        is_base=number == 0,
        trainable_parameters=values["lora.rank"] * (40_000 if values["components"] == "decoder" else 110_000),
        status="stopped" if stopped else "finished",
        value=best[key],
        metrics={key: best[key], "off_prompt_fpr": 0.1},
        best_epoch=best["epoch"],
        epochs=ran,
        history=history,
        started_at=started,
        ended_at=started + 12 * ran + 5,
        seconds=12.0 * ran,
        images_per_second=41.5,
        memory_mb=830.0,
        vision_passes=320 if number == 0 else 0,
        features_loaded=320 * ran,
    )


def text_of(space, records, rejections=(), **summary) -> str:
    return check_page(page_of(space, records, rejections, **summary))


def page_of(space, records, rejections=(), **summary) -> str:
    return render_sweep(space, records, list(rejections), summarise_sweep(space, records, **summary))
