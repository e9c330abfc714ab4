"""Ray Train without helpers that this package does not use, each a process that takes a second or two to start."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class PlainTrainer(DataParallelTrainer):
    """Workers make their own datasets, so nothing shares out those of a trainer."""

    unused: tuple[type, ...] = (DatasetsCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, self.unused)]


class LocalTrainer(PlainTrainer):
    """On a Ray that was started for this run: it has one host and ends with the run.

    So no autoscaler is asked for hosts, and nothing has to free the reservations of a run that was killed.
    """

    unused = (DatasetsCallback, PlacementGroupCleanerCallback)

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        scaling: Any = self.scaling_config
        if not scaling.elasticity_enabled:
            options["scaling_policy"] = _OneHost(scaling)
        return super()._initialize_and_run_controller(**options)


class _OneHost(FixedScalingPolicy):
    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass
