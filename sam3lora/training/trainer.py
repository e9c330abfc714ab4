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
from sam3lora.errors import DiskFull, OutOfMemory
from sam3lora.files import is_full
from sam3lora.model.adapter.folder import save_adapter
from sam3lora.training import distributed, setup
from sam3lora.training.agreement import check_agreement, choose_checkpoint, worker_facts
from sam3lora.training.checkpoints import RunState, load_checkpoint, read_state, refuse_changes, save_checkpoint
from sam3lora.training.datasets import BatchSource, load_run_data
from sam3lora.training.fit_batch import resolve_batch_size
from sam3lora.training.metrics_log import MetricsLog, WarningsToMetrics
from sam3lora.training.notices import HOST_ENDS_SAVE_S, Notices
from sam3lora.training.reporting import log_epoch, log_skipped, log_step, vision_counts
from sam3lora.training.step import StepCounts, TermSums
from sam3lora.training.update import NonFiniteLoss, optimizer_step
from sam3lora.training.validator import Validator

Report = Callable[[dict[str, Any]], None]


def run_worker(payload: dict[str, Any], *, report: Report | None = None) -> dict[str, Any]:
    """The function that each worker of a run executes; returns the steps done, the best loss and its step.

    `payload` has `config` (a dict), `use_ray`, and `accepted_data` of `Trainer`. `report` gets what is measured at each
    validation; on Ray it goes to Ray Train instead.
    """
    config = load_config(payload["config"])
    try:
        trainer = Trainer(
            config,
            Path(config.output.output_dir),
            use_ray=payload["use_ray"],
            report=report,
            accepted_data=payload.get("accepted_data"),
        )
        return trainer.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_too_large(config, error)) from error
    except OSError as error:
        if not is_full(error):
            raise
        raise DiskFull(
            f"cannot write {error.filename or config.output.output_dir} ({error.strerror}). Everything up to the last "
            "checkpoint is kept: make room on the disk, then train again with --resume"
        ) from error


class Trainer:
    """A training worker: the model, its data, the optimizer and the position in the run.

    Making one loads data and model, adds the adapter, restores the last checkpoint if there is one, and compares what
    came of it with the other workers. `run` does the rest. `accepted_data` is the `RunData.digest` with which a run may
    go on although it was made with others, or with another loss or seed.
    """

    def __init__(
        self,
        config: Config,
        output_dir: Path,
        *,
        use_ray: bool,
        report: Report | None = None,
        accepted_data: dict[str, str] | None = None,
    ) -> None:
        warnings = WarningsToMetrics() if use_ray else None
        self.output_dir = output_dir
        self.device = setup.choose_device(config, use_ray=use_ray)
        base = setup.load_base_model(config, self.device)
        self.data = load_run_data(config, base.resolution)
        self.model, self.runner = setup.add_adapter(config, base, self.data, self.device)
        self.optimizer = setup.make_optimizer(config, self.model)
        self.metadata = setup.adapter_metadata(config, base, self.data)
        self.state = self._restore(config, accepted_data)
        facts = worker_facts(config, self.model, base.fingerprint, self.state.step, self.data.digest)
        check_agreement(facts, self.data.file_names)
        self.config = resolve_batch_size(config, self.model, self.runner, self.data)
        self.batches = BatchSource(
            self.data, self.config, use_ray=use_ray, device=self.device, load_ahead=self.runner.images.load_ahead
        )
        self.validator = Validator(self.config, base, self.model, self.runner, self.data, self.batches)
        self.total_steps = self._plan_steps()
        self.log = self._open_log(warnings)
        self.report = setup.ray_report() if use_ray else report
        self.notices = Notices(output_dir, use_ray=use_ray)
        self.looked_for_idle = False
        self._saved_s = time.monotonic()
        self._clock_s = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Train to the last epoch, ``max_steps`` or an early stop."""
        if self.state.step == 0 and self.config.evaluation.base_loss:
            self.measure_base()
        stream = self.batches.training_batches(self.state.epoch, self.state.step_in_epoch)
        with self.notices.listening(), closing(stream):
            self.train_epochs(stream)
        return self.finish()

    # ---- set-up ----------------------------------------------------------------------------------------------------

    def _restore(self, config: Config, accepted_data: dict[str, str] | None) -> RunState:
        """Take adapter and optimizer from the newest checkpoint, if there is one, and return the position in the run.

        Raises:
            UserError: The checkpoint is of a run with other settings or data, unless these data are accepted.
        """
        chosen = choose_checkpoint(self.output_dir / "checkpoints")
        if chosen is None:
            # Hosts with other hardware may draw other weights from the same seed.
            distributed.take_from_first_worker(p for p in self.model.parameters() if p.requires_grad)
            return RunState()
        saved = read_state(chosen)
        changes = saved.changes(_settings_of(config), self.data.digest)
        refuse_changes(chosen, changes, accepted=accepted_data == self.data.digest)
        load_checkpoint(chosen, self.model, self.optimizer)
        if changes:
            saved.state.begin_anew()
        return saved.state

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
            ends = last or state.finished
            if ends or self._save_is_due(epoch_ends):
                self.save()
            if not ends:
                self.notices.obey(state.step)
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
            settings, data = _settings_of(self.config), self.data.digest
            save_checkpoint(root, self.model, self.optimizer, self.state, settings, data, keep=keep)
            self._save_adapter("last", {})
            self._saved_s = time.monotonic()

    def _save_is_due(self, epoch_ends: bool) -> bool:
        """Whether a checkpoint is due in the middle of the run; times are those of the first worker, which saves."""
        training = self.config.training
        if training.save_steps:
            by_step = _is_due(self.state.step, training.save_steps)
        else:
            by_step = epoch_ends
        most_s = math.inf if training.save_minutes is None else 60 * training.save_minutes
        if self.notices.host_ends:
            most_s = HOST_ENDS_SAVE_S
        return by_step or self.notices.save_at_once or time.monotonic() - self._saved_s >= most_s

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
