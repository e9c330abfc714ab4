"""What Ray Serve reads from the environment: it must be set before Ray starts, on every node."""

from __future__ import annotations

import os

FAST_CALLS = {
    # A call between ingress and replica costs about half: our code never blocks the loop it shares with Serve.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}

HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # of 30: a stop would take a minute
}
"""HAProxy in front instead of Serve's own Python proxy."""


def prepare_environment(*, haproxy: bool = False) -> None:
    """Set what is not set yet; before `ray.serve` is imported."""
    for name, value in (FAST_CALLS | (HAPROXY if haproxy else {})).items():
        os.environ.setdefault(name, value)
