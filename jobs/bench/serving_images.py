"""Images that nobody saw before: `sam3lora serve` with and without encoding ahead, beside the plain server."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.load import LoadGenerator, LoadRequest
from jobs.bench.servers import Server, our_server, plain_server
from jobs.bench.serving_report import Rows, ServingReport
from jobs.bench.serving_work import prepare_work

WARM_UP_S = 2.0
WAYS = {"off": "false", "on": "true"}
"""Of `batching.encode_ahead`."""


def measure_new_images(
    *, model: str = "tiny", clients: Sequence[int] = (1, 8, 32), seconds: float = 5.0, repeats: int = 3
) -> ServingReport:
    """All servers run at the same time; in each round each of them is asked, with a new image in every request."""
    with tempfile.TemporaryDirectory(prefix="sam3lora-bench-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        generator = stack.enter_context(LoadGenerator())
        work = prepare_work(folder, model, num_adapters=1, num_pictures=4)
        servers = {"plain": stack.enter_context(plain_server(work.model, work.adapters, folder / "plain.log"))}
        for name, value in WAYS.items():
            config = folder / f"{name}.yaml"
            config.write_text(f"batching: {{encode_ahead: {value}}}\n")
            log = folder / f"{name}.log"
            servers[name] = stack.enter_context(our_server(work.model, work.adapters, log, config=config))
        requests = work.requests(1, "different")
        rounds = [
            {"clients": count, "round": number, **_round(generator, servers, requests, count, seconds)}
            for number in range(1, repeats + 1)
            for count in clients
        ]
    note = (
        "Requests a second of the plain server, and of ours without and with `batching.encode_ahead`. CPU ms: time of "
        "processors for a request, of all processes of a server."
    )
    title = f"New images, {model} model: one JPEG of 640 x 480, one prompt, one adapter, masks as run-length codes"
    return ServingReport(title, [Rows("New images", rounds, note, keys=2)])


def _round(
    generator: LoadGenerator, servers: dict[str, Server], requests: Sequence[LoadRequest], clients: int, seconds: float
) -> dict[str, Any]:
    rates, cpu_ms = {}, {}
    for name, server in servers.items():
        before = _processor_s(server)
        found = generator.closed_loop(
            server.url, requests, clients=clients, seconds=seconds, warm_up_s=WARM_UP_S, all_different=True
        )
        rates[name] = found.per_second
        # Those of the warm-up took processor time as well.
        answered = max(1.0, found.per_second * (seconds + WARM_UP_S))
        cpu_ms[name] = (_processor_s(server) - before) * 1000 / answered
    return {
        "plain /s": rates["plain"],
        **{f"{name} /s": rates[name] for name in WAYS},
        "on / plain": rates["on"] / rates["plain"] if rates["plain"] else None,
        "on / off": rates["on"] / rates["off"] if rates["off"] else None,
        **{f"{name} CPU ms": cpu_ms[name] for name in servers},
    }


def _processor_s(server: Server) -> float:
    parent = psutil.Process(server.pid)
    return sum(sum(one.cpu_times()[:2]) for one in (parent, *parent.children(recursive=True)))
