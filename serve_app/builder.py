"""The Ray Serve application: an HTTP ingress in front of model replicas.

`serve run serve_app/config.yaml` calls `build` with the `args` of that file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH, RAY_SERVE_USE_GRPC_BY_DEFAULT
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from sam3lora.errors import UserError
from serve_app.direct_port import listen_on
from serve_app.logs import log_as_serve
from serve_app.settings import ENVIRONMENT, MESSAGE_LENGTH_VARIABLE, Limits, ServeSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
MESSAGE_HEAD_BYTES = 1 << 20  # beside the image or the masks
QUIET = {"enable_access_log": False, "log_level": logging.WARNING}
MODEL_REPLICA = "serve_app.replica.deployed.ModelReplica"
"""By name: only the replicas import torch, not the process that builds the application."""


@serve.ingress()
class Ingress:
    """The HTTP deployment; its routes are in `serve_app.http.ingress`."""

    def __init__(self, settings: ServeSettings, segmenter: DeploymentHandle, direct_host: str | None) -> None:
        self._settings = settings
        self._segmenter = segmenter
        log_as_serve()
        if direct_host is not None:
            listen_on(direct_host)

    def __serve_build_asgi_app__(self) -> Any:
        from serve_app.http.backend import ServeBackend
        from serve_app.http.ingress import create_api

        backend = ServeBackend(self._segmenter, self._settings)
        self._api = create_api(self._settings, backend, sends_request_id=False)
        return self._api

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests with 503 `not_ready`; returns when those in progress are finished, or late."""
        await self._api.state.drain(timeout_s)


def build(args: ServeSettings) -> Application:
    """The application behind Ray Serve's HTTP process; Ray calls this with the `args` of a file."""
    return build_application(ServeSettings.model_validate(args))


def build_application(
    settings: ServeSettings, *, direct_host: str | None = None, replica_variables: Mapping[str, str] | None = None
) -> Application:
    """The application of these settings; must be called where Ray runs.

    `direct_host` is what its HTTP process listens on where it listens itself: see `serve_app.settings.DIRECT`. Model
    replicas get the environment `replica_variables`.

    Calls of equal affinity go to the same model replica (consistent hashing), so that an adapter is loaded on few
    replicas and an uploaded image is found again. A full replica passes the call to the next one on the ring.
    """
    _check_message_length(settings.limits)
    limits, batching = settings.limits, settings.batching
    num_gpus = settings.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0
    # The replica's own queue refuses a surplus at once and with a message: Serve must let those calls through to it.
    most_ongoing = limits.max_queued + 4 * batching.max_rows
    environment = {"runtime_env": {"env_vars": dict(replica_variables)}} if replica_variables else {}
    segmenter = serve.deployment(
        name="Segmenter",
        max_ongoing_requests=most_ongoing,
        max_queued_requests=limits.max_queued,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": num_gpus, **environment},
        user_config=settings.adapters.model_dump(mode="json"),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        max_constructor_retry_count=2,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=limits.timeout_s,
        logging_config=QUIET,
        **_scale(settings, most_ongoing),
    )(MODEL_REPLICA)  # type: ignore[arg-type]
    # What fails in a process that listens itself is the port, which it has waited for.
    once: dict[str, Any] = {} if direct_host is None else {"max_constructor_retry_count": 1}
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=4 * limits.max_in_flight,  # above what our own admission refuses, with a message
        ray_actor_options={"num_cpus": 0.1},
        max_surge_percent=100,  # it needs few resources: a new one answers before the old one ends
        graceful_shutdown_timeout_s=limits.timeout_s,
        logging_config=QUIET,
        **once,
    )(Ingress)
    return ingress.bind(settings, segmenter.bind(settings), direct_host)


def _check_message_length(limits: Limits) -> None:
    """Refuse an environment in which gRPC would refuse what the limits allow; 4 MiB by default."""
    allowed = RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH
    needed = max(limits.max_body_bytes, limits.max_answer_bytes) + MESSAGE_HEAD_BYTES
    if RAY_SERVE_USE_GRPC_BY_DEFAULT and allowed < needed:
        raise UserError(
            f"{MESSAGE_LENGTH_VARIABLE} is {allowed}, but the limits of the service need messages of {needed} bytes: "
            f"set it to {ENVIRONMENT[MESSAGE_LENGTH_VARIABLE]} before Ray starts, on every host"
        )


def _scale(settings: ServeSettings, most_ongoing: int) -> dict[str, Any]:
    if settings.autoscaling is None:
        return {"num_replicas": settings.replicas}
    wanted = settings.autoscaling
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=wanted.min_replicas,
            max_replicas=wanted.max_replicas,
            target_ongoing_requests=min(wanted.target_ongoing_requests, most_ongoing),
        )
    }
