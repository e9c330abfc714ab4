"""What each worker of a run executes, with the failures of memory and disk in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3lora.config import Config, load_config
from sam3lora.engine.device import is_out_of_memory
from sam3lora.errors import DiskFull, OutOfMemory, RunFailed
from sam3lora.files import is_full
from sam3lora.training.trainer import Report, Trainer


def run_worker(payload: dict[str, Any], *, report: Report | None = None) -> dict[str, Any]:
    """The function that each worker of a run executes; returns the steps done, the best loss and its step.

    `payload` has `config` (a dict), `use_ray`, and `resumed_from` and `accepted_data` of `Trainer`. `report` gets what
    is measured at each validation; on Ray it goes to Ray Train instead.
    """
    config = load_config(payload["config"])
    trainer: Trainer | None = None
    try:
        trainer = Trainer(
            config,
            Path(config.output.output_dir),
            use_ray=payload["use_ray"],
            report=report,
            resumed_from=payload.get("resumed_from"),
            accepted_data=payload.get("accepted_data"),
        )
        return trainer.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if trainer:
            trainer.runner.forget_graphs()  # the error keeps the trainer: a notebook may train again meanwhile
        raise OutOfMemory(_too_large(config, trainer.config if trainer else config, error)) from error
    except OSError as error:
        run = Path(config.output.output_dir)
        if not is_full(error) and not (error.filename and Path(str(error.filename)).is_relative_to(run)):
            raise
        kind, advice = (DiskFull, "make room on the disk") if is_full(error) else (RunFailed, "correct that")
        raise kind(
            f"cannot write {error.filename or run} ({error.strerror}). Everything up to the last checkpoint is kept: "
            f"{advice}, then train again with --resume"
        ) from error


def _too_large(config: Config, chosen: Config, error: BaseException) -> str:
    """What did not fit and what to try; `chosen` has the numbers that the run found in place of `auto`."""
    training = config.training
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    batch_size, max_prompts = (
        f"training.{name}={getattr(chosen.training, name)}" + " (auto)" * (getattr(training, name) == "auto")
        for name in ("batch_size", "max_prompts_per_forward")
    )
    smaller = "half the batch_size"
    smaller += "" if training.images_per_step else " and twice the gradient_accumulation_steps"
    smaller += " (the same step)"
    if training.batch_size == "auto":
        smaller = "a smaller number in place of batch_size: auto"
    return (
        f"out of memory with {batch_size} and {max_prompts}: {first_line}. Try {smaller}, a smaller "
        "max_prompts_per_forward, gradient_checkpointing: true, or model.dtype: bfloat16"
    )
