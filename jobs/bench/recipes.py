"""Two training recipes on drawn data at equal processor seconds: mAP on held-out images, over sets and seeds."""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from jobs.bench.report import machine, machine_line, print_table
from sam3lora.data.coco import ANNOTATION_FILE

OLD, NEW = "old", "new"
# Learning rate, adapter and negatives are the same in both. The epochs of the second are those that take the processor
# seconds of the first, whose number is that of the presets: smaller steps take more seconds an image.
RECIPES: dict[str, dict[str, Any]] = {
    OLD: {"batch_size": 8, "images_per_step": 8, "warmup_steps": 100, "num_epochs": 20},
    NEW: {"batch_size": 4, "images_per_step": 4, "warmup_steps": None, "warmup_ratio": 0.1, "num_epochs": 17},
}
COMMON = {"num_negatives": 3, "lr_scheduler": "cosine", "max_grad_norm": 1.0, "weight_decay": 0.01}
# What the preset `light` adapts, and the text encoder, in which words outside of the tiny one's vocabulary are alike.
ADAPTED = ["lora.apply_to_vision_encoder=false"]
INVENTED = ["blicket", "dax", "fep", "gorp", "wug", "zib", "toma", "modi", "pilk", "koba", "nerf", "lurch", "tove"]


@dataclass(frozen=True)
class DrawnSet:
    """A data set: the domain and seed of its drawing, and how it is asked for.

    `category` is the only one asked for; `renamed` gives objects that the base knows words that it has never seen.
    """

    domain: str
    seed: int
    category: str | None = None
    renamed: bool = False

    def write(self, folder: Path, num_train: int, num_test: int) -> Path:
        from sam3lora.data.synth.dataset import write_dataset

        sizes = {"num_train": num_train, "num_valid": 1, "num_test": num_test}
        return write_dataset(folder, **sizes, seed=self.seed, domain=self.domain, progress=False)

    def categories(self, folder: Path) -> list[str]:
        """Those that the training images show."""
        if self.category is not None:
            return [self.category]
        content = json.loads((folder / "train" / ANNOTATION_FILE).read_text(encoding="utf-8"))
        shown = {annotation["category_id"] for annotation in content["annotations"]}
        return [category["name"] for category in content["categories"] if category["id"] in shown]


SETS = {
    "new objects": DrawnSet("shift", 101),
    "one new object": DrawnSet("shift", 202, category="bolt"),
    "new words": DrawnSet("base", 303, renamed=True),
}


@dataclass(frozen=True)
class RecipeRun:
    """A trained adapter on the held-out images; `cpu_s` are processor seconds of training, start included."""

    set_name: str
    recipe: str
    seed: int
    steps: int
    cpu_s: float
    map: float
    map_50: float
    presence_accuracy: float
    off_prompt_fpr: float


def train_and_measure(
    set_name: str, recipe: str, seed: int, folder: Path, settings: Mapping[str, Any] | None = None
) -> RecipeRun:
    """Train one adapter on a set that lies in `folder`, with one thread, and measure its last state on `test/`.

    `settings` are changes to the recipe, such as `{"max_grad_norm": 0.1}`.
    """
    from sam3lora.config import load_config
    from sam3lora.evaluation.ask.run import evaluate
    from sam3lora.training.launch import train

    torch.set_num_threads(1)
    drawn, settings = SETS[set_name], COMMON | RECIPES[recipe] | dict(settings or {})
    categories = drawn.categories(folder)
    words = dict(zip(categories, INVENTED, strict=False)) if drawn.renamed else {}
    with TemporaryDirectory() as scratch:
        config = load_config(
            "demo",
            [
                *ADAPTED,
                f"training.data_dir={folder}",
                f"output.output_dir={scratch}/run",
                f"training.cache_dir={scratch}/cache",
                f"training.seed={seed}",
                f"data.categories={json.dumps(categories)}",
                f"data.prompts={json.dumps(words)}",
                "data.valid_split=none",
                "scaling.num_workers=0",
                "training.save_steps=1000000",
                "logging.progress=off",
                "logging.plots=false",
                *(f"training.{name}={json.dumps(value)}" for name, value in settings.items()),
            ],
        )
        started = time.process_time()
        result = train(config)
        cpu_s = time.process_time() - started
        found = evaluate(
            folder,
            adapter=result.last_adapter,
            split="test",
            device="cpu",
            categories=tuple(categories),
            max_prompts_per_forward=32,
        )
    values = (found.map, found.map_50, found.presence_accuracy, found.off_prompt_fpr)
    return RecipeRun(set_name, recipe, seed, result.steps, cpu_s, *(float(value or 0.0) for value in values))


def compare_recipes(
    *,
    seeds: Sequence[int],
    num_train: int = 24,
    num_test: int = 64,
    results: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RecipeReport:
    """Every set and seed with both recipes, one process at a time.

    Args:
        results: A file to which each run is appended as a line of JSON; runs that it holds are not repeated.
        settings: Changes to both recipes.
    """
    runs = _read(results)
    known = {(run.set_name, run.recipe, run.seed) for run in runs}
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as scratch:
        folders = {
            name: drawn.write(Path(scratch) / str(number), num_train, num_test)
            for number, (name, drawn) in enumerate(SETS.items())
        }
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
            for seed in seeds:
                for name, folder in folders.items():
                    for recipe in RECIPES:
                        if (name, recipe, seed) not in known:
                            run = processes.submit(train_and_measure, name, recipe, seed, folder, settings).result()
                            runs.append(run)
                            _append(results, run)
    return RecipeReport([run for run in runs if run.seed in seeds])


def _read(file: Path | None) -> list[RecipeRun]:
    if file is None or not file.is_file():
        return []
    return [RecipeRun(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _append(file: Path | None, run: RecipeRun) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(run)) + "\n")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; NaN for a single value.

    >>> mean, half = interval([0.1, 0.2, 0.3])
    >>> round(mean, 3), round(half, 3)
    (0.2, 0.248)
    """
    from scipy.stats import t

    mean, count = statistics.mean(values), len(values)
    if count < 2:
        return mean, math.nan
    return mean, float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)


@dataclass(frozen=True)
class RecipeReport:
    """Runs of both recipes on the same sets and seeds."""

    runs: Sequence[RecipeRun]

    def values(self, recipe: str, name: str, set_name: str | None = None) -> list[float]:
        """A value of the runs of a recipe, on one set or all, ordered by set and seed."""
        chosen = [run for run in self.runs if run.recipe == recipe and set_name in (None, run.set_name)]
        return [getattr(run, name) for run in sorted(chosen, key=lambda run: (run.set_name, run.seed))]

    def differences(self, name: str, set_name: str | None = None) -> list[float]:
        """New minus old, of each pair of runs on the same set with the same seed."""
        pairs = zip(self.values(NEW, name, set_name), self.values(OLD, name, set_name), strict=True)
        return [new - old for new, old in pairs]

    def rows(self) -> Iterable[dict[str, Any]]:
        for set_name in [*dict.fromkeys(run.set_name for run in self.runs), None]:
            for name in ("map", "map_50", "presence_accuracy", "off_prompt_fpr", "cpu_s", "steps"):
                yield {
                    "set": set_name or "all",
                    "value": name,
                    OLD: interval(self.values(OLD, name, set_name)),
                    NEW: interval(self.values(NEW, name, set_name)),
                    "difference": interval(self.differences(name, set_name)),
                }

    def to_dict(self) -> dict[str, Any]:
        runs = [asdict(run) for run in self.runs]
        return {"machine": machine(), "recipes": RECIPES, "common": COMMON, "runs": runs, "rows": list(self.rows())}

    def print(self, console: Console) -> None:
        rows = []
        for row in self.rows():
            digits = 1 if row["value"] in ("cpu_s", "steps") else 3
            values = zip((OLD, NEW, "new - old, paired"), (row[OLD], row[NEW], row["difference"]), strict=True)
            texts = {
                f"{name}, 95 % interval": f"{mean:.{digits}f} +- {half:.{digits}f}" for name, (mean, half) in values
            }
            rows.append({"set": row["set"], "value": row["value"]} | texts)
        print_table(rows, console, keys=2)
        for name, settings in RECIPES.items():
            console.print(f"{name}: {settings}", highlight=False, soft_wrap=True)
        console.print(machine_line(), highlight=False, soft_wrap=True)
