"""Environment variables of Ray Serve; they must be set before Ray starts, on every node."""

from __future__ import annotations

import os

FAST_CALLS = {
    # These halve the cost of a call to a replica: our code never blocks the loop that it shares with Serve.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}

HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 by default, which makes a stop take a minute
}
"""HAProxy in front instead of Serve's own Python proxy."""


def prepare_environment(*, haproxy: bool = False) -> None:
    """Set the variables that are not set; call it before `ray.serve` is imported."""
    for name, value in (FAST_CALLS | (HAPROXY if haproxy else {})).items():
        os.environ.setdefault(name, value)
