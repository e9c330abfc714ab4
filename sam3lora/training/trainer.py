"""`Trainer`: one training worker, from its set-up to the last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from sam3lora.config import Config
from sam3lora.config.training import images_per_step, warmup_steps
from sam3lora.data.batch import Batch
from sam3lora.model.adapter.metadata import read_metadata_values
from sam3lora.start_marks import mark
from sam3lora.training import distributed, setup
from sam3lora.training.agreement import check_agreement, choose_checkpoint, position_facts, run_facts
from sam3lora.training.best import disagreement, is_improved, no_better_than_base
from sam3lora.training.checkpoint_folders import read_state
from sam3lora.training.checkpoints import load_checkpoint, save_checkpoint
from sam3lora.training.datasets import BatchSource, read_splits
from sam3lora.training.fit_batch import resolve_forward_size
from sam3lora.training.gone_images import StepsWithoutImages
from sam3lora.training.metrics_log import MetricsLog, WarningsToMetrics
from sam3lora.training.notices import HOST_ENDS_SAVE_S, Notices
from sam3lora.training.reporting import log_epoch, log_plan, log_skipped, log_step, vision_counts
from sam3lora.training.saved_run import RunState, refuse_changes
from sam3lora.training.step import StepCounts, TermSums
from sam3lora.training.task import task_of
from sam3lora.training.update import NonFiniteLoss, optimizer_step

Report = Callable[[dict[str, Any]], None]


class Trainer:
    """A training worker: the model, its data, the optimizer and the position in the run.

    Making one loads data and model, adds the adapter, restores the last checkpoint if there is one, and compares what
    came of it with the other workers. `run` does the rest. `resumed_from` names the checkpoint that ``--resume`` found:
    the run goes on from it or from a newer one. `accepted_data` is the `RunData.digest` with which a run may go on
    although it was made with others, or with another loss or seed.
    """

    def __init__(
        self,
        config: Config,
        output_dir: Path,
        *,
        use_ray: bool,
        report: Report | None = None,
        resumed_from: str | None = None,
        accepted_data: dict[str, str] | None = None,
    ) -> None:
        mark("imports of training")
        warnings = WarningsToMetrics() if use_ray else None
        self.task, self.output_dir = task_of(config), output_dir
        self.device = setup.choose_device(config, use_ray=use_ray)
        folder = setup.find_base_model(config)  # first: a mistake there would be told after the data are read
        with ThreadPoolExecutor(1) as beside:  # a large set takes seconds to index, and a large model to load
            reading = beside.submit(read_splits, config)
            base = setup.load_base_model(config, folder, self.device)
            mark("model")
            self.data = self.task.load_data(config, base.resolution, base.patch_size, reading.result())
        mark("data")
        self.model, self.runner = self.task.build(config, base, self.data, self.device)
        self.optimizer = setup.make_optimizer(config, self.model, self.task.learning_rates(config))
        self.metadata = self.task.metadata(config, base, self.data)
        check_agreement(run_facts(config, self.model, base.fingerprint, self.data.digest), self.data.file_names)
        self.state = self._restore(config, resumed_from, accepted_data)
        check_agreement(position_facts(self.model, self.state.step))
        step_images = self._images_per_step(config)
        self.config = resolve_forward_size(config, self.task, self.model, self.runner, self.data, step_images)
        self.runner.max_prompts = self.config.training.prompts_per_forward
        self.batches = BatchSource(
            self.data,
            self.config,
            images_per_step=step_images,
            use_ray=use_ray,
            device=self.device,
            load_ahead=self.runner.images.load_ahead,
            other_nodes=setup.nodes_of_other_workers(use_ray=use_ray),
        )
        self.validator = self.task.validator(self.config, base, self.model, self.runner, self.data, self.batches)
        self.total_steps = self._plan_steps()
        self.best_metric, reason = distributed.on_first_worker(
            None, lambda _: self.task.deciding_metric(config, self.data)
        )
        self.state.judge_by(self.best_metric)
        self.state.finished = self.state.stays_stopped(config.training.early_stopping_patience)
        self.log = self._open_log(warnings)
        if self.log:
            log_plan(self, self.best_metric, reason)
        self.report = setup.ray_report() if use_ray else report
        self.notices = Notices(output_dir, use_ray=use_ray)
        self.looked_for_idle = False
        self._without_images = StepsWithoutImages()
        self._saved_s = time.monotonic()
        self._clock_s = time.perf_counter()
        mark("adapter, text features")

    def run(self) -> dict[str, Any]:
        """Train to the last epoch, ``max_steps`` or an early stop."""
        if self.state.step == 0 and self.config.evaluation.base_loss:
            self.measure_base()
            mark("loss of the base")
        stream = self.batches.training_batches(self.state.epoch, self.state.step_in_epoch)
        with self.notices.listening(), closing(stream):
            self.train_epochs(stream)
        return self.finish()

    # ---- set-up ----------------------------------------------------------------------------------------------------

    def _restore(self, config: Config, resumed_from: str | None, accepted_data: dict[str, str] | None) -> RunState:
        """Take adapter and optimizer from the newest checkpoint, if there is one, and return the position in the run.

        Raises:
            UserError: The checkpoint is of a run with other settings or data, unless these data are accepted.
        """
        chosen = choose_checkpoint(self.output_dir / "checkpoints", resumed_from)
        if chosen is None:
            # Hosts with other hardware may draw other weights from the same seed.
            distributed.take_from_first_worker(p for p in self.model.parameters() if p.requires_grad)
            return RunState()
        saved = read_state(chosen)
        changes = saved.changes(_settings_of(config), self.data.digest, self.metadata.base_fingerprint)
        refuse_changes(chosen, changes, accepted=accepted_data == self.data.digest)
        learned = load_checkpoint(chosen, self.model, self.optimizer, self.task.learned(self.model))
        self.task.restore(self.model, learned)
        state = saved.state_with(_settings_of(config))
        if changes:
            state.begin_anew()
        return state

    def _images_per_step(self, config: Config) -> int:
        """Images of one step over all workers: as configured, else as the run began, whatever workers it has now."""
        if self.state.step and config.training.images_per_step is None:
            return self.state.images_per_step
        return images_per_step(config.training, distributed.world_size())

    def _plan_steps(self) -> int:
        """Steps of the whole run, from the position in it.

        If a resumed run is given another `images_per_step`, it continues at the same place in the epoch.
        """
        state, training, batches = self.state, self.config.training, self.batches
        state.step_in_epoch = state.step_in_epoch * state.images_per_step // batches.images_per_step
        state.images_per_step = batches.images_per_step
        epochs_left = training.num_epochs - state.epoch
        total = state.step + epochs_left * batches.steps_per_epoch - state.step_in_epoch
        total = min(total, training.max_steps or total)
        if state.warmup_steps is None or training.warmup_steps is not None:
            state.warmup_steps = warmup_steps(training, total)
        return total

    def _open_log(self, warnings: WarningsToMetrics | None) -> MetricsLog | None:
        """The first worker's `metrics.jsonl`, with its ``start`` line and the faults of the data."""
        if distributed.rank() != 0:
            return None
        log = MetricsLog(self.output_dir, after_step=self.state.step, tensorboard=self.config.logging.tensorboard)
        log.write(
            "start",
            step=self.state.step,
            task=self.config.task,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            device=str(self.device),
            num_workers=distributed.world_size(),
            steps_per_epoch=self.batches.steps_per_epoch,
            batch_size=self.config.training.batch_size,
            max_prompts_per_forward=self.config.training.max_prompts_per_forward,
            images_per_step=self.batches.images_per_step,
            best_metric=self.best_metric,
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
        """Log what the adapter has to beat: the validation loss, and some metrics, before the first step."""
        valid = self._validation_terms()
        if valid is None:
            return
        metrics = {}
        if self.validator.measures_base and self.config.evaluation.every_epochs:
            metrics = self.validator.metrics()
        measured = {"valid_loss": valid.loss(), **metrics}
        self.state.base_values = {
            name: float(value) for name, value in measured.items() if value is not None and math.isfinite(value)
        }
        if self.log:
            self.log.write("base", step=0, valid_terms=valid.means(), **measured)

    def train_epochs(self, stream: Iterator[Batch]) -> None:
        """Steps, with validation and checkpoints where they are due."""
        state, training = self.state, self.config.training
        sums = TermSums(self.runner.weights, dict(state.epoch_sums), StepCounts(*state.epoch_counts))
        self._lap()
        while not state.finished and state.step < self.total_steps:
            # A group never mixes epochs: the plan gives every epoch a whole number of groups.
            group = list(islice(stream, self.batches.forwards_per_step))
            assert len(group) == self.batches.forwards_per_step, "the plan of a run has the batches of every step"
            self.step(group, sums)
            epoch_ends = state.step_in_epoch == self.batches.steps_per_epoch
            last = state.step == self.total_steps
            if epoch_ends or last or _is_due(state.step, training.eval_steps):
                self.validate(sums, epoch_ends=epoch_ends, forced=last)
            if epoch_ends:
                state.epoch, state.step_in_epoch = state.epoch + 1, 0
                sums = TermSums(self.runner.weights)
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
        if not self.state.step:
            mark("first step")
        self.state.step, self.state.step_in_epoch = self.state.step + 1, self.state.step_in_epoch + 1
        seconds = self._lap()
        self._note_skipped(group, counts)
        log_step(self, terms, grad_norm, seconds, waited)

    def _note_skipped(self, group: list[Batch], counts: StepCounts) -> None:
        """Log the bad images of a step; `counts` are those of all workers."""
        if self.config.training.on_bad_image == "skip":
            mine = [one for batch in group for one in batch.skipped]
            skipped = [one for of_worker in distributed.gather_objects(mine) for one in of_worker]
            log_skipped(self, skipped)
            self._without_images.count(counts.num_images, skipped)

    def validate(self, sums: TermSums, *, epoch_ends: bool, forced: bool) -> None:
        """Log the epoch so far with the validation loss and metrics, keep the best adapter, and stop early if due.

        The loss is due every `eval_steps`, else every epoch, and wherever the metrics are: every `every_epochs`.
        `forced` measures both.
        """
        state, training, every = self.state, self.config.training, self.config.evaluation.every_epochs
        metrics_due = every > 0 and (forced or (epoch_ends and (state.epoch + 1) % every == 0))
        loss_due = forced or training.eval_steps is None or _is_due(state.step, training.eval_steps)
        if not (loss_due or metrics_due):
            log_epoch(self, sums, None, {})
            return
        valid = self._validation_terms()
        measured = valid if valid is not None else sums
        name, loss = ("train_loss" if valid is None else "valid_loss"), measured.loss()
        metrics = self.validator.metrics() if valid is not None and metrics_due else {}
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"validation loss is not finite after step {state.step}. The last checkpoint is intact. "
                "Try a lower training.learning_rate, or mixed_precision: no"
            )
        improved = is_improved(state, self.best_metric, {name: loss, **metrics})
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
            base = self.metadata.base_fingerprint
            learned = self.task.learned(self.model)
            save_checkpoint(root, learned, self.model, self.optimizer, self.state, settings, data, keep=keep, base=base)
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
        saved = read_metadata_values(self.output_dir / "last") or {}
        if saved.get("metrics", {}).get("step") != state.step:  # killed after the last checkpoint, before this
            self._save_adapter("last", {})
        if state.best_step is None:  # the metric had no value, although the labels allow one: every image was skipped
            self._save_adapter("best", {})
        if self.log:
            if state.best_step is None:
                self.log.write(
                    "warning", step=state.step, message=f"{self.best_metric} had no value: best/ is the last adapter"
                )
            if differs := disagreement(state, self.best_metric):
                self.log.write("note", step=state.step, message=differs)
            if worse := no_better_than_base(state, self.best_metric):
                self.log.write("note", step=state.step, message=worse)
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
            self.task.save(self.model, self.output_dir / name, self.metadata)

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._clock_s = self._clock_s, time.perf_counter()
        return self._clock_s - before


def _is_due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is due after `step`; never with None."""
    return every is not None and step % every == 0


def _settings_of(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")
