"""Idle processes of a local Ray that import what an actor needs while the actor is still to come.

A process takes 5 seconds to import torch and transformers, and Ray Train or Ray Serve as long to ask for one. Ray gives
an actor an idle process that has the environment variables of the actor and has run nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_KEPT_IDLE_S = 120


def calls(function: str) -> dict[str, str]:
    """The environment variable by which a process of Ray calls a function at its start: "module.function"."""
    from ray._private import ray_constants

    return {ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: function}


def start_ahead(function: str, variables: Mapping[str, str], *, count: int, made_by_actor: bool) -> None:
    """Start processes that call `function`, in which `is_ahead` is true once. If that fails, the start is slower.

    Args:
        function: As "module.function".
        variables: Those of the actors that are to get the processes, other than `calls(function)`.
        count: Number of processes.
        made_by_actor: Whether an actor that has variables itself makes the actors.
    """
    try:
        _start(function, {**variables, **calls(function)}, count, made_by_actor)
    except Exception:  # private parts of Ray
        logger.debug("no process was started ahead", exc_info=True)


def _start(function: str, variables: dict[str, str], count: int, made_by_actor: bool) -> None:
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray._private.worker import global_worker
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
    from ray.experimental.internal_kv import _internal_kv_put
    from ray.runtime_env import RuntimeEnv

    described = get_runtime_env_info(RuntimeEnv(env_vars=variables))
    if made_by_actor:  # Ray compares texts, and writes one without spaces when it adds the variables of the maker
        described.serialized_runtime_env = json.dumps({"env_vars": variables}, sort_keys=True, separators=(",", ":"))
    messages: Any = node_manager_pb2
    request = messages.PrestartWorkersRequest(  # of Python, the first of Ray's languages
        job_id=global_worker.current_job_id.binary(),
        num_workers=count,
        keep_alive_duration_secs=_KEPT_IDLE_S,
        runtime_env_info=described,
    )
    for number in range(count):
        _internal_kv_put(f"{_tickets(function)}{number}", b"")
    [node] = ray.nodes()
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)


def is_ahead(function: str) -> bool:
    """Whether the process that calls `function` is one of `start_ahead`.

    Others call it, too: the tasks of an actor inherit its variables. As many calls are answered with true as there are
    such processes, so that a process may ask once.
    """
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list

    return any(_internal_kv_del(ticket) for ticket in _internal_kv_list(_tickets(function)))


def _tickets(function: str) -> str:
    """How the keys of tickets begin in Ray's store of small values, one for each process: who deletes one has it."""
    return f"sam3lora/ahead/{function}/"
