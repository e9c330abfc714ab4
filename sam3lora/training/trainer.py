"""`Trainer`: one training worker, from its set-up to the last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from sam3lora.config import Config, load_config
from sam3lora.data.batch import Batch
from sam3lora.engine.device import is_out_of_memory
from sam3lora.errors import OutOfMemory
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.training import distributed, setup
from sam3lora.training.checkpoints import RunState, list_checkpoints, load_checkpoint, save_checkpoint
from sam3lora.training.datasets import BatchSource, load_run_data
from sam3lora.training.fit_batch import resolve_batch_size
from sam3lora.training.metrics_log import MetricsLog, WarningsToMetrics
from sam3lora.training.reporting import log_epoch, log_skipped, log_step, vision_counts
from sam3lora.training.step import StepCounts, TermSums
from sam3lora.training.update import NonFiniteLoss, optimizer_step
from sam3lora.training.validator import Validator

Report = Callable[[dict[str, Any]], None]


def run_worker(payload: dict[str, Any], *, report: Report | None = None) -> dict[str, Any]:
    """The function that each worker of a run executes; returns the steps done, the best loss and its step.

    `payload` has `config` (a dict) and `use_ray`. `report` gets what is measured at each validation; on Ray it goes to
    Ray Train instead.
    """
    config = load_config(payload["config"])
    try:
        return Trainer(config, Path(config.output.output_dir), use_ray=payload["use_ray"], report=report).run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_too_large(config, error)) from error


class Trainer:
    """A training worker: the model, its data, the optimizer and the position in the run.

    Making one loads data and model, adds the adapter and restores the last checkpoint if there is one. `run` does the
    rest.
    """

    def __init__(self, config: Config, output_dir: Path, *, use_ray: bool, report: Report | None = None) -> None:
        warnings = WarningsToMetrics() if use_ray else None
        self.output_dir = output_dir
        self.device = setup.choose_device(config, use_ray=use_ray)
        base = setup.load_base_model(config, self.device)
        self.data = load_run_data(config, base.resolution, base.patch_size)
        self.model, self.runner = setup.add_adapter(config, base, self.data, self.device)
        self.optimizer = setup.make_optimizer(config, self.model)
        self.metadata = setup.adapter_metadata(config, base, self.data)
        self.state = self._restore(config)
        self.config = resolve_batch_size(config, self.model, self.runner, self.data)
        self.batches = BatchSource(
            self.data, self.config, use_ray=use_ray, device=self.device, load_ahead=self.runner.images.load_ahead
        )
        self.validator = Validator(self.config, base, self.model, self.runner, self.data, self.batches)
        self.total_steps = self._plan_steps()
        self.log = self._open_log(warnings)
        self.report = setup.ray_report() if use_ray else report
        self.looked_for_idle = False
        self._clock_s = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Train to the last epoch, ``max_steps`` or an early stop."""
        if self.state.step == 0 and self.config.evaluation.base_loss:
            self.measure_base()
        with closing(self.batches.training_batches(self.state.epoch, self.state.step_in_epoch)) as stream:
            self.train_epochs(stream)
        return self.finish()

    # ---- set-up ----------------------------------------------------------------------------------------------------

    def _restore(self, config: Config) -> RunState:
        saved = list_checkpoints(self.output_dir / "checkpoints")
        if not saved:
            return RunState()
        return load_checkpoint(saved[-1], self.model, self.optimizer, _settings_of(config))

    def _plan_steps(self) -> int:
        """Steps of the whole run, from the position in it.

        With other workers or batches than before, a step takes another number of images. Then the run continues at the
        same place in the epoch.
        """
        state, training, batches = self.state, self.config.training, self.batches
        state.step_in_epoch = state.step_in_epoch * state.images_per_step // batches.images_per_step
        state.images_per_step = batches.images_per_step
        epochs_left = training.num_epochs - state.epoch
        total = state.step + epochs_left * batches.steps_per_epoch - state.step_in_epoch
        return min(total, training.max_steps or total)

    def _open_log(self, warnings: WarningsToMetrics | None) -> MetricsLog | None:
        """The first worker's `metrics.jsonl`, with its ``start`` line and the faults of the data."""
        if distributed.rank() != 0:
            return None
        log = MetricsLog(self.output_dir, after_step=self.state.step, tensorboard=self.config.logging.tensorboard)
        log.write(
            "start",
            step=self.state.step,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            device=str(self.device),
            num_workers=distributed.world_size(),
            steps_per_epoch=self.batches.steps_per_epoch,
            batch_size=self.config.training.batch_size,
            gradient_accumulation_steps=self.config.training.gradient_accumulation_steps,
            no_valid=self.data.no_valid,
            **self.metadata.data,
        )
        if self.data.faults:
            folder = self.config.training.data_dir
            log.write("faults", step=self.state.step, data_dir=str(folder), faults=self.data.faults)
        if warnings:
            warnings.write_to(log)
        return log

    # ---- the run ---------------------------------------------------------------------------------------------------

    def measure_base(self) -> None:
        """Log the validation loss before the first step: that of the base model, which the adapter has to beat."""
        valid = self._validation_terms()
        if self.log and valid is not None:
            self.log.write("base", step=0, valid_loss=valid.loss(), valid_terms=valid.means())

    def train_epochs(self, stream: Iterator[Batch]) -> None:
        """Steps, with validation and checkpoints where they are due."""
        state, training = self.state, self.config.training
        sums = TermSums(self.runner.criterion.weights, dict(state.epoch_sums), StepCounts(*state.epoch_counts))
        self._lap()
        while not state.finished and state.step < self.total_steps:
            # A group never mixes epochs: the plan gives every epoch a whole number of groups.
            group = list(islice(stream, training.gradient_accumulation_steps))
            assert group, "the plan of a run has a batch for every step"
            self.step(group, sums)
            epoch_ends = state.step_in_epoch == self.batches.steps_per_epoch
            last = state.step == self.total_steps
            if epoch_ends or last or _is_due(state.step, training.eval_steps):
                self.validate(sums, epoch_ends=epoch_ends, forced=last)
            if epoch_ends:
                state.epoch, state.step_in_epoch = state.epoch + 1, 0
                sums = TermSums(self.runner.criterion.weights)
            state.epoch_sums, state.epoch_counts = dict(sums.sums), sums.counts.tensor().tolist()
            save_due = _is_due(state.step, training.save_steps) if training.save_steps else epoch_ends
            if save_due or last or state.finished:
                self.save()
            self._lap()

    def step(self, group: list[Batch], sums: TermSums) -> None:
        """One update of the adapter, added to the sums of the epoch."""
        waited = self._lap()
        terms, counts, grad_norm = optimizer_step(self, group)
        sums.add(terms, counts)
        self.state.step, self.state.step_in_epoch = self.state.step + 1, self.state.step_in_epoch + 1
        log_step(self, group, terms, grad_norm, self._lap(), waited)

    def validate(self, sums: TermSums, *, epoch_ends: bool, forced: bool) -> None:
        """Log the epoch so far with the validation loss and metrics, keep the best adapter, and stop early if due.

        `forced` validates even where `eval_steps` and `every_epochs` say that it is not due.
        """
        state, training, evaluation = self.state, self.config.training, self.config.evaluation
        if training.eval_steps and not forced and not _is_due(state.step, training.eval_steps):
            log_epoch(self, sums, None, {})
            return
        valid = self._validation_terms()
        measured = valid if valid is not None else sums
        name, loss = ("train_loss" if valid is None else "valid_loss"), measured.loss()
        metrics = {}
        every = evaluation.every_epochs
        if valid is not None and every and (forced or (epoch_ends and (state.epoch + 1) % every == 0)):
            metrics = self.validator.metrics()
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"validation loss is not finite after step {state.step}. The last checkpoint is intact. "
                "Try a lower training.learning_rate, or mixed_precision: no"
            )
        best_metric = evaluation.chosen_best_metric if valid is not None else "valid_loss"
        improved = _improved(state, loss, metrics, best_metric)
        log_epoch(self, sums, valid, metrics)
        if improved:
            self._save_adapter("best", {name: loss, **metrics})
        patience = training.early_stopping_patience
        if patience and state.evaluations_without_improvement >= patience:
            state.finished = True
            if self.log:
                self.log.write("early_stop", step=state.step, best_step=state.best_step, best_loss=state.best_loss)
        if self.report:
            self.report({"step": state.step, "epoch": state.epoch + 1, name: loss, **metrics})

    def save(self) -> None:
        """A checkpoint and the ``last`` adapter, by the first worker."""
        if distributed.rank() == 0:
            root, keep = self.output_dir / "checkpoints", self.config.training.save_total_limit
            save_checkpoint(root, self.model, self.optimizer, self.state, _settings_of(self.config), keep=keep)
            self._save_adapter("last", {})

    def finish(self) -> dict[str, Any]:
        state, counts = self.state, vision_counts(self)
        state.finished = True
        if self.log:
            skipped = {line["path"] for line in self.log.lines() if line["kind"] == "skipped_image"}
            self.log.write("end", step=state.step, best_step=state.best_step, num_skipped=len(skipped), **counts)
        return {"step": state.step, "best_loss": state.best_loss, "best_step": state.best_step}

    def _validation_terms(self) -> TermSums | None:
        terms = self.validator.loss_terms()
        log_skipped(self, self.validator.skipped)
        return terms

    def _save_adapter(self, name: str, metrics: dict[str, Any]) -> None:
        if distributed.rank() == 0:
            epoch = self.state.epoch + (self.state.step_in_epoch > 0)  # begun or finished
            self.metadata.metrics = {"step": self.state.step, "epoch": epoch, **metrics}
            save_adapter(self.model, self.output_dir / name, self.metadata)

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._clock_s = self._clock_s, time.perf_counter()
        return self._clock_s - before


def _improved(state: RunState, loss: float, metrics: dict[str, Any], best_metric: str) -> bool:
    """Whether this is the best adapter so far by `best_metric`; updates the best values in `state`.

    Loss and metrics can disagree: the classification term is small for a model that finds nothing, and grows when it
    begins to find something.
    """
    if best_metric == "valid_loss":
        better = state.best_loss is None or loss < state.best_loss
    else:
        value = metrics.get(best_metric)
        if value is None:
            return False
        better = state.best_metric_value is None or value > state.best_metric_value
    if better:
        state.best_loss, state.best_step = loss, state.step
        state.best_metric_value = metrics.get(best_metric)
    state.evaluations_without_improvement = 0 if better else state.evaluations_without_improvement + 1
    return better


def _is_due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is due after `step`; never with None."""
    return every is not None and step % every == 0


def _settings_of(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _too_large(config: Config, error: BaseException) -> str:
    training = config.training
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    smaller = "half the batch_size and twice the gradient_accumulation_steps (the same step)"
    if training.batch_size == "auto":
        smaller = "a number in place of batch_size: auto, which takes what fits when the run starts"
    return (
        f"out of memory with training.batch_size={training.batch_size} and training.max_prompts_per_forward="
        f"{training.max_prompts_per_forward}: {first_line}. Try {smaller}, fewer prompts per forward, "
        "gradient_checkpointing: true, or model.dtype: bfloat16"
    )
