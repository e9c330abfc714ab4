"""The tables of the serving benchmark, each with the load it takes to fill it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bench.bare_call import time_bare_calls
from jobs.bench.load import LoadGenerator, LoadRequest, LoadResult
from jobs.bench.servers import Server, our_server, plain_server
from jobs.bench.serving_report import Rows
from jobs.bench.serving_work import Images, ServingPlan, ServingWork, prepare_work
from sam3lora.errors import UserError

REFUSED = (503, 429)
WARM_UP_SHARE = 0.2
"""Of the seconds of each measurement, before it."""


@dataclass(frozen=True)
class Bench:
    """Both servers, ready to be asked."""

    plan: ServingPlan
    work: ServingWork
    generator: LoadGenerator
    plain: Server
    ours: Server

    def closed_loops(self, clients: int, adapters: int, images: Images) -> tuple[LoadResult, LoadResult]:
        """The plain server, then ours."""
        plain, ours = (
            self.generator.closed_loop(
                server.url,
                self.work.requests(adapters, images),
                clients=clients,
                seconds=self.plan.seconds,
                warm_up_s=self.plan.seconds * WARM_UP_SHARE,
                all_different=images == "different",
            )
            for server in (self.plain, self.ours)
        )
        return plain, ours


def cold_and_warm(bench: Bench) -> Rows:
    """Every request brings a new image, so that only the adapter is cold or warm."""
    firsts = [of_adapter[0] for of_adapter in bench.work.questions.values()]
    requests = [question.request(as_new=True) for question in firsts for _ in range(2)]
    plain, ours = (_in_order_ms(bench.generator, server, requests) for server in (bench.plain, bench.ours))
    rows: list[dict[str, Any]] = [
        {"": "start until ready, s", "plain": bench.plain.start_s, "ours": bench.ours.start_s},
        {"": "first request, ms", "plain": plain[0], "ours": ours[0]},
    ]
    if len(firsts) > 1:
        first, slowest = "first request of an adapter, median ms", "first request of an adapter, slowest ms"
        rows += [
            {"": first, "plain": statistics.median(plain[2::2]), "ours": statistics.median(ours[2::2])},
            {"": slowest, "plain": max(plain[2::2]), "ours": max(ours[2::2])},
        ]
    warm = {"plain": statistics.median(plain[1::2]), "ours": statistics.median(ours[1::2])}
    rows.append({"": "its second request, median ms", **warm})
    note = "New images throughout. The plain server has loaded all adapters when it is ready; ours has none."
    return Rows("Cold and warm, one client", rows, note)


def grid(bench: Bench) -> Rows:
    rows = [
        {"clients": clients, "adapters": adapters, **_beside(*bench.closed_loops(clients, adapters, bench.plan.images))}
        for clients, adapters in itertools.product(bench.plan.clients, bench.plan.adapters)
    ]
    note = "A client sends its next request when the last is answered. Latencies are those of status 200."
    return Rows(f"Closed loop, images: {bench.plan.images}", rows, note, keys=2)


def image_patterns(bench: Bench) -> Rows:
    clients = sorted(bench.plan.clients)[len(bench.plan.clients) // 2]
    patterns: tuple[Images, ...] = ("same", "pool", "different")
    rows = [{"images": images, **_beside(*bench.closed_loops(clients, 1, images))} for images in patterns]
    pool = len(next(iter(bench.work.questions.values())))
    note = f"Same: one image; pool: {pool} images in turns; different: a new one with every request. Ours keeps images."
    return Rows(f"Images, {clients} clients, 1 adapter", rows, note)


def overhead(bench: Bench) -> Rows:
    adapter, (question, *_) = next(iter(bench.work.questions.items()))
    bare_known, bare_new = time_bare_calls(
        bench.work.model, bench.work.adapters / adapter, question, seconds=bench.plan.seconds / 2
    )
    rows = []
    for name, bare_ms, all_different in (("known", bare_known, False), ("new", bare_new, True)):
        found = bench.generator.closed_loop(
            bench.ours.url,
            [question.request()],
            clients=1,
            seconds=bench.plan.seconds,
            warm_up_s=bench.plan.seconds * WARM_UP_SHARE,
            all_different=all_different,
        )
        http_ms = _p50(answered(found))
        rows.append({"image": name, "HTTP p50 ms": http_ms, "bare p50 ms": bare_ms, "overhead ms": http_ms - bare_ms})
    note = "Bare: the model's own calls, in a process by themselves."
    return Rows("HTTP overhead of ours, one client", rows, note)


def open_loop(bench: Bench, capacity: float) -> Rows:
    from serve_app.settings import ServeSettings

    rows = []
    requests = bench.work.requests(max(bench.plan.adapters), bench.plan.images)
    for factor in (0.5, 1.0, 2.0):
        found = bench.generator.open_loop(
            bench.ours.url, requests, per_second=factor * capacity, seconds=bench.plan.seconds
        )
        refused = sum(map(found.num_of, REFUSED))
        status = next((status for status in REFUSED if found.num_of(status)), REFUSED[0])
        rows.append(
            {
                "x capacity": factor,
                "arrivals": len(found.samples),
                "accepted/s": found.per_second,
                "p50 ms": found.latency_ms(50),
                "p99 ms": found.latency_ms(99),
                "refused %": 100 * refused / max(1, len(found.samples)),
                "refused p50 ms": found.latency_ms(50, status),
                "refused p99 ms": found.latency_ms(99, status),
                "other errors": found.num_errors - refused,
            }
        )
    limits = ServeSettings.model_validate({}).limits
    note = (
        f"Capacity: {capacity:.1f} requests/s, answered in the closed loop with most clients and adapters. At most "
        f"{limits.max_queued} wait ({limits.max_queued / capacity:.1f} s at capacity); limit {limits.timeout_s:.0f} s."
    )
    return Rows("Open loop: Poisson arrivals, ours", rows, note)


def repeated_image(folder: Path, generator: LoadGenerator, *, haproxy: bool = False) -> Rows:
    """Both servers start again, with the small model."""
    folder.mkdir()
    repeats = 3
    work = prepare_work(folder, "small", num_adapters=1, num_pictures=3)
    (questions,) = work.questions.values()
    requests = [questions[0].request(as_new=True)]  # to warm up
    requests += [question.request() for question in questions for _ in range(1 + repeats)]
    rows = []
    servers = {
        "plain": plain_server(work.model, work.adapters, folder / "plain.log"),
        "ours": our_server(work.model, work.adapters, folder / "ours.log", haproxy=haproxy),
    }
    for name, starting in servers.items():
        with starting as server:
            found = _in_order_ms(generator, server, requests)[1:]
        first = statistics.median(found[:: 1 + repeats])
        again = statistics.median(ms for place, ms in enumerate(found) if place % (1 + repeats))
        rows.append({"server": name, "first ms": first, "repeated ms": again, "repeated / first": again / first})
    note = f"Medians over {len(questions)} images, each asked once and then {repeats} times."
    return Rows("A repeated image, small model (336 pixels, random weights), one client", rows, note)


def rates_beside(plain: LoadResult, ours: LoadResult) -> dict[str, Any]:
    """Requests a second of both servers and how long the median request takes."""
    return {
        "plain /s": plain.per_second,
        "ours /s": ours.per_second,
        "ours / plain": ours.per_second / plain.per_second if plain.per_second else None,
        "plain p50 ms": plain.latency_ms(50),
        "ours p50 ms": ours.latency_ms(50),
    }


def _beside(plain: LoadResult, ours: LoadResult) -> dict[str, Any]:
    return rates_beside(plain, ours) | {
        "plain p99 ms": plain.latency_ms(99),
        "ours p99 ms": ours.latency_ms(99),
        "plain errors": plain.num_errors,
        "ours errors": ours.num_errors,
    }


def capacity(grid: Rows) -> float:
    rate = max(grid.rows, key=lambda row: (row["clients"], row["adapters"]))["ours /s"]
    if not rate:
        raise UserError("sam3lora answered nothing in the closed loop: measure for more seconds")
    return rate


def _p50(found: LoadResult) -> float:
    value = found.latency_ms(50)
    if value is None:
        raise UserError("nothing was answered in time: measure for more seconds")
    return value


def _in_order_ms(generator: LoadGenerator, server: Server, requests: Sequence[LoadRequest]) -> list[float]:
    return [sample.latency_s * 1000 for sample in answered(generator.in_order(server.url, requests)).samples]


def answered(found: LoadResult) -> LoadResult:
    if found.num_errors:
        statuses = sorted({sample.status for sample in found.samples if not sample.ok})
        raise UserError(f"{found.num_errors} of {len(found.samples)} requests failed, with status {statuses}")
    return found
