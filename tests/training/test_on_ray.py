"""What Ray Train's errors become, and what reaches the user of a worker's warnings; no Ray runs here."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import ray.train
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from sam3lora.data.images import ImageError
from sam3lora.errors import RunFailed, UserError
from sam3lora.training import on_ray, ray_trainer
from sam3lora.training.metrics_log import MetricsLog, WarningsToMetrics, read_metrics
from sam3lora.training.update import NonFiniteLoss

LOST = WorkerHealthCheckFailedError("A worker health check failed.\nThe actor died: killed by SIGKILL.", OSError())


@pytest.mark.parametrize("mistake", [UserError("no prompts"), ImageError("cannot read x.png"), NonFiniteLoss("nan")])
def test_mistakes_end_the_run_at_once(mistake):
    # Raised in the controller they are final; beside the error of a worker that waited for the first one, too.
    errors = {0: RuntimeError("connection closed by peer"), 1: mistake}
    with pytest.raises(type(mistake), match=str(mistake)):
        ray_trainer.EndOnMistake().after_exception(run_context=None, worker_exceptions=errors)


def test_lost_workers_are_left_to_the_restarts():
    ray_trainer.EndOnMistake().after_exception(run_context=None, worker_exceptions={0: LOST, 1: RuntimeError("closed")})


def test_errors_say_what_they_are_to_the_user(make_config):
    config = make_config("scaling.max_failures=3")
    # A mistake arrives as the cause of a failed controller, or of one that wraps another.
    mistake = UserError("no prompts")
    assert ray_trainer.as_user_error(ray.train.ControllerError(ray.train.ControllerError(mistake)), config) is mistake
    # A lost worker explains the errors of the others: no traceback is needed.
    both = ray.train.WorkerGroupError("...", {0: RuntimeError("connection closed by peer"), 1: LOST})
    lost = ray_trainer.as_user_error(both, config)
    assert isinstance(lost, RunFailed)
    assert "worker 1 was lost and scaling.max_failures=3" in str(lost)
    assert "killed by SIGKILL" in str(lost)
    # Anything else is a fault in the program, to be shown with its traceback.
    fault = ray_trainer.as_user_error(ray.train.WorkerGroupError("...", {0: KeyError("masks")}), config)
    assert type(fault) is RuntimeError
    assert "masks" in str(fault)


def test_settings_in_the_environment_last_as_long_as_the_run(make_config, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    with on_ray._environment(make_config("scaling.worker_start_timeout_s=7"), is_local=True):
        assert float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) == 7
        # The user's own choice stands.
        assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" not in os.environ


def test_worker_that_does_not_see_the_run_folder_says_where_it_runs(make_config, tmp_path):
    # Hosts that do not share the output would train and leave nothing.
    payload = {"config": make_config(output="elsewhere").model_dump(mode="json"), "use_ray": True}
    with pytest.raises(UserError, match=rf"worker on host {ray_trainer.socket.gethostname()} does not see .*elsewhere"):
        ray_trainer.worker_entry(payload)


def test_warnings_of_a_worker_go_where_the_user_looks(tmp_path: Path):
    handler = WarningsToMetrics()
    try:
        logger = logging.getLogger("sam3lora.training.datasets")
        logger.warning("left out %d images", 3)  # before there is a file
        logger.info("of no interest")
        handler.write_to(MetricsLog(tmp_path))
        logger.warning("and another")
    finally:
        logging.getLogger("sam3lora").removeHandler(handler)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["message"]) for line in lines] == [
        ("warning", "left out 3 images"),
        ("warning", "and another"),
    ]
